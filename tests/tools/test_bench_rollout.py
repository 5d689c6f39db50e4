"""Tests that bench_rollout.py gives all engines the same work, and that `ours` does no unnecessary work."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import bench_jobs
import bench_limits
import bench_rollout
from bench_rollout_worker import Ours, batches, run_freely
from support.commands import REPOSITORY, TINY_MODEL

VOCAB_SIZE = 24


@pytest.fixture(scope="module")
def job():
    options = ["--model", str(TINY_MODEL), "--slots", "8", "--median-len", "6"]
    return bench_jobs.make_jobs(bench_rollout.parse(options), VOCAB_SIZE)[0]


def rows_of(job):
    return [row for rows in job["rounds"] for row in rows]


def test_rounds_follow_from_the_rewards(job):
    first, *later = job["rounds"]
    assert [(r["problem"], r["sample"], r["prefix_len"]) for r in first] == [
        (i, j, 0) for i in range(bench_jobs.NUM_PROBLEMS) for j in range(4)
    ]
    second = {(r["problem"], r["sample"]): r for r in later[0]}
    for i, problem in enumerate(job["problems"]):
        guided = np.mean(problem["rewards"][:4]) < 0.5
        expected = int(0.2 * len(problem["expert"])) if guided else 0
        assert [second[i, j]["prefix_len"] for j in (4, 5)] == [expected] * 2


def test_grpo_samples_the_same_number_of_tokens(job):
    grpo = bench_jobs.grpo_job(job)
    assert bench_jobs.num_tokens(grpo) == bench_jobs.num_tokens(job)
    assert len(rows_of(grpo)) == 8 * bench_jobs.NUM_PROBLEMS


def test_batches_contain_every_row_once_and_fit_into_the_slots(job):
    contexts = [context for batch, _ in batches(job) for context in batch]
    assert sorted(map(len, contexts)) == sorted(
        len(job["problems"][row["problem"]]["prompt"]) + row["prefix_len"] for row in rows_of(job)
    )
    assert max(len(batch) for batch, _ in batches(job)) <= job["slots"]


@pytest.mark.slow
def test_only_prompts_and_their_extensions_are_prefilled(job):
    """Each problem's prompt and longest prefix are prefilled, except for the last token, which decoding reads."""
    longest = dict.fromkeys(range(len(job["problems"])), 0)
    for row in rows_of(job):
        longest[row["problem"]] = max(longest[row["problem"]], row["prefix_len"])
    expected = sum(len(job["problems"][i]["prompt"]) + n - 1 for i, n in longest.items())
    reply = Ours(str(TINY_MODEL), "float32", run_freely).run(job)
    assert reply["prefilled_tokens"] == expected
    assert reply["decoded_tokens"] == bench_jobs.num_tokens(job)


def test_bytes_to_move_are_weights_per_step_and_keys_and_values_per_token(job):
    limits = {"weight_bytes": 10**6, "entry_bytes": 1}
    weights, entries = divmod(bench_limits.bytes_to_move(job, limits), 10**6)
    rows = rows_of(job)
    assert weights == max(
        -(-sum(row["num_new"] for row in rows) // 8), *(row["num_new"] for row in rows)
    )
    seen = [
        len(job["problems"][row["problem"]]["prompt"]) + row["prefix_len"] + i
        for row in rows
        for i in range(row["num_new"])
    ]
    assert entries == sum(seen)


@pytest.mark.slow
def test_the_command_compares_and_writes_json(tmp_path):
    """The model folder has no weights, so the engines use random weights."""
    file, shape = tmp_path / "bench.json", tmp_path / "shape"
    shape.mkdir()
    shutil.copy(TINY_MODEL / "config.json", shape)
    options = ["--workload", "uniform", "--engines", "ours,tunix", "--repeats", "1"]
    options += ["--rows", "1,12", "--new-len", "20"]
    result = subprocess.run(
        [sys.executable, "tools/bench_rollout.py", "--model", shape, *options, "--json", file],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "tunix is not installed and is skipped" in result.stdout
    report = json.loads(file.read_text())
    assert [r["workload"] for r in report["results"]] == ["uniform 1", "uniform 12"]
    assert [r["tokens"] for r in report["results"]] == [20, 240]
    for r in report["results"]:
        assert r["compiles_after_warm_up"] == 0


@pytest.mark.slow
def test_a_profile_lists_programs_and_operations():
    options = ["--rows", "4", "--new-len", "20", "--operations", "12"]
    result = subprocess.run(
        [sys.executable, "tools/profile_sampling.py", "--model", TINY_MODEL, *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for expected in ("decode_segment", "prefill", "a decode step of 4 rows takes", "dot_general"):
        assert expected in result.stdout
