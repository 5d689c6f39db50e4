"""Tests the grader of reasoning-gym's tasks."""

import pytest

pytest.importorskip("reasoning_gym", reason="requires the extra `tasks`")

from trapo_jax.rewards import make_grader
from trapo_jax.rewards.reasoning_gym import grade_reasoning_gym
from trapo_jax.types import Problem, Verdict

CORRECT, WRONG = Verdict.CORRECT, Verdict.WRONG
COUNTDOWN = {"numbers": [3, 5, 2], "target": 16, "expression": "(3 + 5) * 2"}


def grade(response, answer, task, metadata=None):
    return grade_reasoning_gym(response, Problem("", (), answer, source=task), metadata or {})[0]


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("4 - 1 = 3\n3 - 7 = -4\nThe final answer is \\boxed{-4}.", CORRECT),
        ("The answer is -4", CORRECT),
        ("\\boxed{-4.0}", CORRECT),
        ("\\boxed{4}", WRONG),
        ("3 - 7 = -4", WRONG),  # states no answer
        ("", WRONG),
        ("\\boxed{" + "9" * 3000 + "}", WRONG),
    ],
)
def test_numbers_are_compared_by_value(response, verdict):
    assert grade(response, "-4", "chain_sum") == verdict


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("\\boxed{sun}", CORRECT),
        ("\\boxed{\\text{sun}}", CORRECT),
        ("The final answer is sun.", CORRECT),
        ("\\boxed{nus}", WRONG),
        ("\\boxed{sunny}", WRONG),
    ],
)
def test_words_are_scored_by_the_task(response, verdict):
    assert grade(response, "sun", "spell_backward", {"word": "nus"}) == verdict


def test_another_correct_answer_than_the_reference_is_accepted():
    assert grade(r"\boxed{2 * (5 + 3)}", "(3 + 5) * 2", "countdown", COUNTDOWN) == CORRECT
    assert grade(r"\boxed{2 * 5 + 3}", "(3 + 5) * 2", "countdown", COUNTDOWN) == WRONG


def test_an_answer_that_the_task_cannot_read_is_wrong():
    assert grade(r"\boxed{two}", "2 × 2", "prime_factorization") == WRONG


@pytest.mark.slow
def test_the_grader_runs_in_worker_processes():
    problem = Problem("", (), "sun", source="spell_backward", columns={"metadata": {"word": "nus"}})
    with make_grader(["reasoning_gym"], num_workers=1, timeout_secs=60) as grader:
        assert grader.submit(r"\boxed{sun}", problem).result().reward == 1.0
        assert grader.submit(r"\boxed{nus}", problem).result().reward == 0.0
