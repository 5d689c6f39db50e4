"""Checks that a run with a non-finite gradient and an occasionally failing grader continues and reports both."""

import itertools

import numpy as np
import pytest

from fault_harness.comparison import read_checkpoint
from support.commands import run_command
from support.short_run import JOB, TINY_JOB, copy_unfinished
from trapo_jax.rewards import Grader, WeightedFunction, card_shuffles_grader
from trapo_jax.rollouts import actor
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.train import main as train
from trapo_jax.training import learner


def corrupt_first_batch(monkeypatch):
    build_batch, batches = learner.build_batch, itertools.count()

    def corrupt(rows, **options):
        if next(batches) == 0:
            rows = [row._replace(advantage=float("nan")) for row in rows]
        return build_batch(rows, **options)

    monkeypatch.setattr(learner, "build_batch", corrupt)


def make_grader_unreliable(monkeypatch):
    def make_grader(names, *, eos_text, **_):
        verify, answers = card_shuffles_grader(eos_text), itertools.count(1)

        def unreliable(text, problem):
            if next(answers) % 50 == 0:
                raise ValueError
            return verify(text, problem)

        options = {"is_inline": True, "sees_special_tokens": True}
        return Grader([WeightedFunction("unreliable", unreliable, **options)])

    monkeypatch.setattr(actor, "make_grader", make_grader)


@pytest.mark.slow
def test_an_update_with_a_non_finite_gradient_is_skipped_and_reported(
    finished_run, tmp_path, monkeypatch
):
    """The first step after resuming has a non-finite gradient. The grader fails once every 50 calls."""
    folder = tmp_path / "run"
    before = copy_unfinished(finished_run[0], folder)
    spoiled, after = before + 1, before + 2
    steps = (before, spoiled, after)
    often = ("checkpoint.every=1", "checkpoint.keep=9")
    corrupt_first_batch(monkeypatch)
    make_grader_unreliable(monkeypatch)
    result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB, *often)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: step {spoiled}: the update was skipped because loss/policy_gradient was not finite"
    ]
    records = {r["step"]: r for r in read_metrics(folder) if r["kind"] == "train"}
    assert [records[step]["optimizer/skipped"] for step in steps] == [0, 1, 0]
    assert [records[step]["optimizer/skipped_in_a_row"] for step in steps] == [0, 1, 0]
    assert records[spoiled]["loss/policy_gradient"] is None
    assert [records[step]["reward/error_rate"] * 32 for step in steps] == [0, 0, 1]
    states = {}
    for step in steps:
        states[step] = read_checkpoint(folder, step)[0]
    assert len(states[before]) > 20
    for name, value in states[before].items():
        if "params" in name:
            np.testing.assert_array_equal(states[spoiled][name], value)
    moved = [
        n for n, x in states[after].items() if "params" in n and (x != states[spoiled][n]).any()
    ]
    assert len(moved) == sum("params" in name for name in states[after])


@pytest.mark.slow
def test_a_run_without_any_applied_update_fails(tmp_path, monkeypatch, capsys):
    """The run exports nothing and, when it is resumed, fails in the same way."""
    build_batch = learner.build_batch

    def corrupt(rows, **options):
        return build_batch([row._replace(advantage=float("inf")) for row in rows], **options)

    monkeypatch.setattr(learner, "build_batch", corrupt)
    for _ in range(2):
        assert train([f"output_dir={tmp_path / 'run'}", *TINY_JOB]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(
            "error: step 2: every update was skipped, the last one because loss/policy_gradient was not finite"
        )
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "hf").exists()
