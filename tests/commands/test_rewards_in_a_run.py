"""Verdicts in whole runs: counted, logged, and a grader that fails too often stops the run."""

import pytest

from support.commands import run_command
from trapo_jax.rollouts.metrics import check_grades
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    TrainingFailed,
    Verdict,
)

SHORT = (
    "train.num_steps=2",
    "evaluation.num_samples=1",
    "data.num_validation=4",
    "data.num_test=4",
)


def test_a_grader_that_always_raises_stops_the_run_at_once(tmp_path):
    """No answer of card shuffles is a letter, which the multiple-choice grader takes for an error."""
    folder = tmp_path / "run"
    result = run_command(
        "trapo_jax.train", f"output_dir={folder}", "rewards.grader=multiple_choice", *SHORT
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "step 1: of 64 rollouts the grader failed on 64 and timed out on 0" in last
    assert "rewards.max_error_rate=0.2" in last
    assert "Traceback" not in result.stderr
    (evaluation,) = [r for r in read_metrics(folder) if r["kind"] == "eval"]
    assert evaluation["eval/error_rate"] == 1.0


def test_a_run_with_a_grader_in_processes(tmp_path):
    """Mathematics finds no answer in card shuffles: every verdict is WRONG, none failed."""
    folder = tmp_path / "run"
    result = run_command(
        "trapo_jax.train",
        f"output_dir={folder}",
        "rewards.grader=math",
        "rewards.timeout_secs=60",
        *SHORT,
    )
    assert result.returncode == 0, result.stderr
    for record in read_metrics(folder):
        prefix = "eval" if record["kind"] == "eval" else "reward"
        assert record[f"{prefix}/error_rate"] == record[f"{prefix}/timeout_rate"] == 0.0
        assert record.get("reward/mean", 0.0) == 0.0


def groups(num_errors, num_timeouts):
    verdicts = [Verdict.ERROR] * num_errors + [Verdict.TIMEOUT] * num_timeouts
    verdicts += [Verdict.WRONG] * (100 - len(verdicts))
    request = RolloutRequest(Problem("0" * 16, (1,), ""), 0)
    completion = Completion(request, (), (), FinishReason.STOP)
    return [[Rollout(completion, verdict, 0.0)] for verdict in verdicts]


def test_a_few_failures_do_not_stop_a_run():
    check_grades(groups(1, 0), 1, max_error_rate=0.01)
    check_grades(groups(10, 10), 1, max_error_rate=0.2)


@pytest.mark.parametrize(("errors", "timeouts"), [(21, 0), (0, 21), (11, 10)])
def test_errors_and_timeouts_count_alike(errors, timeouts):
    with pytest.raises(TrainingFailed, match=f"step 7: .* {errors} and timed out on {timeouts}"):
        check_grades(groups(errors, timeouts), 7, max_error_rate=0.2)
