"""A run with a non-finite gradient and a grader that occasionally fails continues and reports both."""

import numpy as np

import inject_faults
from support.commands import run_command
from support.short_run import JOB, TINY_JOB, copy_unfinished
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.train import main as train
from trapo_jax.training import learner

PATCHED_TRAIN = """
import itertools, sys
from trapo_jax import train
from trapo_jax.rollouts import actor
from trapo_jax.training import learner
from trapo_jax.rewards import Grader, WeightedFunction, card_shuffles_grader

build_batch, batches = learner.build_batch, itertools.count()

def corrupt_first_batch(rows, **options):
    if next(batches) == 0:
        rows = [row._replace(advantage=float("nan")) for row in rows]
    return build_batch(rows, **options)

def make_unreliable_grader(names, *, eos_text, **_):
    verify, answers = card_shuffles_grader(eos_text), itertools.count(1)
    def unreliable(text, problem):
        if next(answers) % 100 == 0:
            raise ValueError
        return verify(text, problem)
    function = WeightedFunction("unreliable", unreliable, is_inline=True, sees_special_tokens=True)
    return Grader([function])

learner.build_batch, actor.make_grader = corrupt_first_batch, make_unreliable_grader
sys.exit(train.main())
"""


def test_an_update_with_a_non_finite_gradient_is_skipped_and_reported(finished_run, tmp_path):
    """Runs steps 11 and 12 after a resume, with a grader that fails once per hundred calls, which is counted."""
    folder, script = tmp_path / "run", tmp_path / "patched_train.py"
    before = copy_unfinished(finished_run[0], folder)
    assert before == 10
    script.write_text(PATCHED_TRAIN)
    job = (f"output_dir={folder}", *JOB, "checkpoint.every=1")
    result = run_command("patched_train", *job, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: step 11: the update was skipped because loss/policy_gradient was not finite"
    ]
    records = {r["step"]: r for r in read_metrics(folder) if r["kind"] == "train"}
    assert [records[step]["optimizer/skipped"] for step in (10, 11, 12)] == [0, 1, 0]
    assert [records[step]["optimizer/skipped_in_a_row"] for step in (10, 11, 12)] == [0, 1, 0]
    assert records[11]["loss/policy_gradient"] is None
    assert [records[step]["reward/error_rate"] * 64 for step in (10, 11, 12)] == [0, 0, 1]
    states = {}
    for step in (10, 11, 12):
        states[step] = inject_faults.read_checkpoint(folder, step)[0]
    assert len(states[10]) > 20
    for name, value in states[10].items():
        if "params" in name:
            np.testing.assert_array_equal(states[11][name], value)
    moved = [n for n, x in states[12].items() if "params" in n and (x != states[11][n]).any()]
    assert len(moved) == sum("params" in name for name in states[12])


def test_a_run_that_applied_no_update_fails(tmp_path, monkeypatch, capsys):
    """It fails in the same way when it is resumed, and exports nothing."""
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
