"""Tests grading in whole runs: failures are counted and logged, and a grader that fails too often stops the run."""

import json

import pytest

from support.commands import run_command
from support.grades import ERROR, TIMEOUT, WRONG
from trapo_jax.rollouts.metrics import check_grades
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    TrainingFailed,
)

SHORT = (
    "train.num_steps=2",
    "evaluation.num_samples=1",
    "data.num_validation=4",
    "data.num_test=4",
)


STRICT = """
def strict(response, problem):
    if "#" in response and not response.rstrip().endswith("#" + problem.answer):
        raise ValueError("another answer")
    return True
"""


@pytest.mark.slow
def test_a_grader_that_fails_on_most_samples_stops_the_run_immediately(tmp_path):
    """The grader accepts all responses of the preflight check: expert solutions, gold answers and empty responses."""
    folder = tmp_path / "run"
    (tmp_path / "mine.py").write_text(STRICT)
    result = run_command(
        *("trapo_jax.train", f"output_dir={folder}", "rewards.functions=mine:strict"),
        *("rewards.timeout_secs=60", "method.name=grpo", "rewards.max_error_rate=0.1", *SHORT),
        cwd=tmp_path,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "step 1: the reward function strict judged " in last
    assert "x ValueError: another answer); the share" in last
    assert "rewards.max_error_rate=0.1" in last
    assert "Traceback" not in result.stderr
    assert "WARNING" not in result.stderr
    assert "warning: reward function mine:strict: ValueError: another answer" in result.stderr
    (evaluation,) = [r for r in read_metrics(folder) if r["kind"] == "eval"]
    assert evaluation["eval/error_rate"] > 0
    samples = read_lines(folder / "samples.jsonl")  # samples of the step that stopped the run
    assert {sample["step"] for sample in samples} == {1}
    reasons = {reason for sample in samples for reason in sample["missing"].values()}
    assert reasons == {"ValueError: another answer"}


@pytest.mark.slow
def test_a_run_with_grader_processes(tmp_path):
    """The math grader finds no answers in card shuffles, so every verdict is WRONG and none is an error."""
    folder = tmp_path / "run"
    result = run_command(
        "trapo_jax.train",
        f"output_dir={folder}",
        "rewards.functions=math",
        "rewards.timeout_secs=60",
        "method.name=grpo",  # TRAPO would reject a dataset whose expert solutions are all judged wrong.
        *SHORT,
    )
    assert result.returncode == 0, result.stderr
    for record in read_metrics(folder):
        prefix = "eval" if record["kind"] == "eval" else "reward"
        assert record[f"{prefix}/error_rate"] == record[f"{prefix}/timeout_rate"] == 0.0
        assert record.get("reward/mean", 0.0) == 0.0
    assert "warning: in all 2 steps, no sampled rollout was correct; check rewards" in result.stdout


def groups(num_errors, num_timeouts):
    grades = [ERROR] * num_errors + [TIMEOUT] * num_timeouts
    grades += [WRONG] * (100 - len(grades))
    request = RolloutRequest(Problem("0" * 16, (1,), ""), 0)
    completion = Completion(request, (), (), FinishReason.STOP)
    return [[Rollout(completion, grade)] for grade in grades]


def test_a_few_failures_do_not_stop_a_run():
    check_grades(groups(1, 0), 1, max_error_rate=0.01)
    check_grades(groups(10, 10), 1, max_error_rate=0.2)


@pytest.mark.parametrize(
    ("errors", "timeouts", "reasons"),
    [
        (21, 0, "21 x ValueError"),
        (0, 21, r"21 x timeout \(rewards.timeout_secs\)"),
        (11, 10, "11 x ValueError, 10 x timeout"),
    ],
)
def test_errors_and_timeouts_are_counted_together(errors, timeouts, reasons):
    with pytest.raises(
        TrainingFailed, match=f"step 7: .* test judged 79 of 100 rollouts \\({reasons}"
    ):
        check_grades(groups(errors, timeouts), 7, max_error_rate=0.2)


REWARDS = """
import os

def brevity(response, problem):
    return 1 - len(response) / 1000

def fragile(response, problem):
    if response.rstrip().endswith(("9", "7")):
        os.abort()
    return True

def wrong(response, problem):
    return False, "nothing"
"""

CONFIG = """
method: {name: grpo}
data: {num_train: 16, num_validation: 4, num_test: 4}
train: {num_steps: 2, problems_per_step: 4}
rewards:
  functions: [card_shuffles, my_rewards:brevity, my_rewards:fragile]
  weights: [8, 1, 1]
  by_source: {"k=[34]": my_rewards:wrong}
  max_error_rate: 0.9
  timeout_secs: 60
evaluation: {num_samples: 2}
"""


@pytest.mark.slow
def test_functions_in_the_config_folder_are_weighted_and_selected_by_source(tmp_path):
    """`evaluate` uses the same functions as `train`. If a function crashes, only its own rewards are missing."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my_rewards.py").write_text(REWARDS)
    config = tmp_path / "conf" / "mine.yaml"
    config.write_text(CONFIG)
    run = tmp_path / "run"
    result = run_command("trapo_jax.train", "--config", config, f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    samples = read_lines(run / "samples.jsonl")
    result = run_command(
        *("trapo_jax.evaluate", "--config", config, f"model.path={run}"),
        *(f"output_dir={tmp_path / 'scores'}", "evaluation.num_samples=2"),
    )
    assert result.returncode == 0, result.stderr
    assert f"{config}: this is a training config; an evaluation uses only" in result.stdout
    samples += read_lines(tmp_path / "scores" / "samples.jsonl")
    for folder in (run, tmp_path / "scores"):
        assert list(json.loads((folder / "user_code.json").read_text())) == ["my_rewards"]
    num_crashed = 0
    for sample in samples:
        first, *others = sample["rewards"]
        assert first in ("card_shuffles", "wrong")
        assert others == ["brevity", "fragile"]
        rewards = sample["rewards"]
        if rewards["fragile"] is None:
            assert sample["missing"] == {"fragile": "the process died"}
            assert sample["reward"] == pytest.approx((8 * rewards[first] + rewards["brevity"]) / 9)
            num_crashed += 1
        else:
            expected = 0.8 * rewards[first] + 0.1 * rewards["brevity"] + 0.1
            assert sample["reward"] == pytest.approx(expected)
        if first == "wrong":
            assert (sample["answer"], sample["is_correct"]) == ("nothing", False)
    assert 0 < num_crashed < len(samples)
    train = [record for record in read_metrics(run) if record["kind"] == "train"]
    assert all(0.9 < record["rewards/brevity"] < 1 for record in train)
    assert all(record["reward/missing"] == 0 for record in train)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
