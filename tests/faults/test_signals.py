"""Checks that a signal stops a run at the rollout engine's next step, whatever the run is doing.

A resumed run repeats the interrupted work, and its result equals an uninterrupted run's result bit for bit.
"""

import filecmp
import json
import signal
from typing import NamedTuple

import pytest

from fault_harness.comparison import differences
from support.commands import run_command
from support.short_run import JOB, checkpoint_steps
from support.signal_at import signal_at
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.runs.manifests import MANIFEST


class Moment(NamedTuple):
    """Specifies when a signal is sent and what must be on disk afterwards.

    Attributes:
      activity, step, report: see `support/signal_at.py`.
      stopped_after: number of completed steps.
      checkpoint: the newest checkpoint; None if there is none.
      last_record: kind and step of the last record in metrics.jsonl; None if there is none.
    """

    activity: str
    step: int
    report: int
    stopped_after: int
    checkpoint: int | None
    last_record: tuple[str, int] | None


FIRST_EVALUATION = Moment("evaluating test", 0, 2, 0, None, None)
FIRST_SAMPLING = Moment("step 1", 1, 2, 0, 0, ("eval", 0))
UPDATE = Moment("step 2: updating the parameters", 2, 0, 2, 2, ("train", 2))
EVALUATION = Moment("evaluating validation", 5, 1, 5, 5, ("train", 5))
SAMPLING = Moment("step 8", 8, 3, 7, 7, ("train", 7))
# There is already a checkpoint of step 9, so nothing has to be saved.
SAMPLING_AFTER_CHECKPOINT = Moment("step 10", 10, 1, 9, 9, ("train", 9))
FINAL_EVALUATION = Moment("evaluating test", 12, 2, 12, 12, ("train", 12))
SIGNALS = (
    (FIRST_EVALUATION, signal.SIGINT),
    (FIRST_SAMPLING, signal.SIGTERM),
    (UPDATE, signal.SIGTERM),
    (EVALUATION, signal.SIGINT),
    (SAMPLING, signal.SIGTERM),
    (SAMPLING_AFTER_CHECKPOINT, signal.SIGINT),
    (FINAL_EVALUATION, signal.SIGTERM),
)


def interrupt(folder, moment, number, monkeypatch):
    """Runs the job, sends the signal at the given moment, and returns the job's output."""
    with monkeypatch.context() as patch:
        signal_at(patch.setattr, *moment[:3], number)
        result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
    assert result.returncode == 0, result.stderr
    assert "a second Ctrl-C ends the process immediately, without saving" in result.stderr
    return result.stdout


def assert_stopped_at(folder, moment, output):
    assert "after the signal" not in output
    when = f"after step {moment.stopped_after}" if moment.stopped_after else "before the first step"
    if moment is FINAL_EVALUATION:
        when += "; the final evaluation and the export are missing"
    assert f"stopped {when}; the same command resumes it" in output
    assert not (folder / "summary.json").exists()
    records = [(r["kind"], r["step"]) for r in read_metrics(folder)]
    assert (records or [None])[-1] == moment.last_record
    has_checkpoint = (folder / "checkpoints").is_dir()
    assert (checkpoint_steps(folder)[-1] if has_checkpoint else None) == moment.checkpoint
    evaluations = folder / "evaluations"
    names = {path.name for path in evaluations.iterdir()} if evaluations.is_dir() else set()
    assert names == {f"{r['split']}_{r['step']}.json" for r in read_metrics(folder) if "split" in r}


def assert_equal_to(folder, uninterrupted):
    assert differences(folder, uninterrupted) == []
    assert checkpoint_steps(folder) == checkpoint_steps(uninterrupted)
    evaluations = [path.name for path in (uninterrupted / "evaluations").iterdir()]
    for name in (
        "hf/model.safetensors",
        *(f"evaluations/{name}" for name in evaluations),
        "summary.json",
    ):
        assert filecmp.cmp(folder / name, uninterrupted / name, shallow=False), name
    for step in checkpoint_steps(uninterrupted):
        manifests = (run / "checkpoints" / str(step) / MANIFEST for run in (folder, uninterrupted))
        ours, theirs = (json.loads(path.read_text())["score"] for path in manifests)
        assert ours == theirs


@pytest.mark.slow
def test_a_stopped_run_repeats_the_interrupted_work(finished_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for moment, number in SIGNALS:
        assert_stopped_at(folder, moment, interrupt(folder, moment, number, monkeypatch))
    result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
    assert result.returncode == 0, result.stderr
    assert_equal_to(folder, finished_run[0])
