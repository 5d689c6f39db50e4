"""Tests that bench_train.py gives all engines the same rows and compares their losses."""

import json
import subprocess
import sys

import pytest

import bench_train
from bench_train_worker import ENGINES, padded_micro_batches
from support.commands import REPOSITORY, TINY_MODEL

ARGUMENTS = ["--model", str(TINY_MODEL), "--row-len", "64", "--rows", "2", "--num-rollouts", "7"]


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *ARGUMENTS])
    return bench_train.ragged_job(bench_train.parse(), vocab_size=24)


@pytest.mark.slow
def test_packed_and_padded_rows_have_the_same_loss(job):
    lens = [len(row["prompt"]) + len(row["response"]) for row in job["rows"]]
    assert max(lens) == 64
    packed, unpacked = (
        ENGINES[name](str(TINY_MODEL), "float32").run(job) for name in ("ours", "ours, unpacked")
    )
    assert packed["loss"] == pytest.approx(unpacked["loss"], rel=1e-5)
    assert unpacked["computed_tokens"] == 4 * 2 * 64
    assert sum(lens) <= packed["computed_tokens"] < unpacked["computed_tokens"]


@pytest.mark.slow
def test_shared_prompts_give_the_same_loss_with_fewer_tokens(monkeypatch):
    options = ["--rows", "1", "--num-rollouts", "32"]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *ARGUMENTS, *options])
    job = bench_train.grouped_job(bench_train.parse(), vocab_size=24)
    shared, unshared = (
        ENGINES[name](str(TINY_MODEL), "float32").run(job) for name in ("ours", "ours, unshared")
    )
    assert shared["loss"] == pytest.approx(unshared["loss"], rel=1e-5)
    assert shared["computed_tokens"] < unshared["computed_tokens"]


def test_padded_micro_batches_contain_every_token_once(job):
    seen = [row for batch in padded_micro_batches(job) for row in zip(*batch, strict=True)]
    assert len(seen) == 7
    found = {tuple(t for t, v in zip(ids, valid, strict=True) if v) for ids, _, valid in seen}
    assert found == {tuple(row["prompt"] + row["response"]) for row in job["rows"]}
    trained = sum(sum(row) for _, row, _ in seen)
    assert trained == sum(len(row["response"]) for row in job["rows"])


def test_engines_with_different_losses_are_rejected():
    bench_train.check_losses({"ours": 2.0, "torch": 2.001}, "equal", 1e-3)
    with pytest.raises(SystemExit, match="equal: the engines' first losses differ"):
        bench_train.check_losses({"ours": 2.0, "torch": 2.01}, "equal", 1e-3)


@pytest.mark.slow
def test_the_command_compares_and_writes_json(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--engines", "ours,tunix", "--repeats", "1", "--json", str(file)]
    result = subprocess.run(
        [sys.executable, "tools/bench_train.py", *ARGUMENTS, *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "tunix is not installed and is skipped" in result.stdout
    results = json.loads(file.read_text())["results"]
    assert [(r["workload"], r["engine"]) for r in results] == [
        ("equal", "ours"),
        ("ragged", "ours"),
        ("grouped", "ours"),
    ]
    assert all(r["tokens_per_sec"] > r["trained_tokens_per_sec"] > 0 for r in results)
