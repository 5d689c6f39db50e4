"""Tests graders: choosing reward functions by name and source, weights, async functions, and isolated failures."""

import pytest

from support import reward_functions
from trapo_jax.rewards import Grader, WeightedFunction, make_grader
from trapo_jax.rewards.grader import combine
from trapo_jax.rewards.judgments import as_judgment
from trapo_jax.types import Judgment, Problem, UserError, Verdict

PATIENT = {"num_workers": 1, "timeout_secs": 60.0}
MODULE = "support.reward_functions"


def problem(answer="42", source="", **columns):
    return Problem("id", (1,), answer, prompt_text="What is it?", source=source, columns=columns)


@pytest.fixture(scope="module")
def grader():
    names = ["math", *(f"{MODULE}:{name}" for name in ("shortness", "crash_on_7", "difficulty"))]
    with make_grader(names, weights=[6, 2, 1, 1], special_tokens=["<eos>"], **PATIENT) as grader:
        yield grader


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0),
        (False, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        ("correct", 1.0),
        (Verdict.WRONG, 0.0),
        ("error", None),
        (Verdict.TIMEOUT, None),
        ((0.5, "seven"), 0.5),
    ],
)
def test_supported_return_values(value, reward):
    assert as_judgment(value).reward == reward


@pytest.mark.parametrize(
    "value", [None, 1.5, -0.1, float("nan"), float("inf"), "yes", [], (1, 2, 3)]
)
def test_other_return_values_are_rejected(value):
    with pytest.raises(ValueError):
        as_judgment(value)


def test_the_reward_is_the_weighted_mean(grader):
    grade = grader.submit(r"\boxed{42}", problem(difficulty=0.5)).result()
    rewards = {name: judgment.reward for name, judgment in grade.judgments.items()}
    assert rewards == {"math": 1.0, "shortness": 0.9, "crash_on_7": 1.0, "difficulty": 0.5}
    assert grade.reward == pytest.approx((6 * 1.0 + 2 * 0.9 + 1 * 1.0 + 1 * 0.5) / 10)
    assert grade.is_correct
    assert grade.answer == "42"
    assert grade.missing == {}


def test_a_crash_affects_only_the_rewards_of_its_function(grader):
    grade = grader.submit(r"\boxed{7}", problem(difficulty=0.5)).result()
    assert grade.missing == {"crash_on_7": "the process died"}
    assert not grade.is_correct
    assert grade.reward == pytest.approx((2 * 0.91 + 1 * 0.5) / 9)
    after = grader.submit(r"\boxed{42}", problem(difficulty=0.5)).result()
    assert after.missing == {}


def test_the_reward_is_missing_if_the_first_reward_is_missing():
    functions = [WeightedFunction(name, len) for name in "ab"]
    missing = Judgment(None, reason="timeout")
    grade = combine(functions, [missing, Judgment(1.0)])
    assert grade.reward is None
    assert not grade.is_correct
    assert combine(functions, [Judgment(0.5), missing]).reward == 0.5


def test_special_tokens_of_the_tokenizer_are_removed():
    tokens = ["<｜end▁of▁sentence｜>", "</s>", "<|im_end|>"]
    with make_grader(["math"], special_tokens=tokens, **PATIENT) as grader:
        for token in tokens:
            for response in (f"so\n#### 42{token}", f"The answer is 42.{token}"):
                assert grader.submit(response, problem()).result().is_correct, response


def test_the_card_shuffles_reward_requires_eos():
    with make_grader(["card_shuffles"], eos_text="<eos>", special_tokens=["<eos>"]) as grader:
        assert grader.submit("#12345<eos>", problem("12345")).result().is_correct
        assert not grader.submit("#12345", problem("12345")).result().is_correct


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "judge"),
    [
        ("ARC-Challenge", "multiple_choice"),
        ("arc_easy", "multiple_choice"),
        ("archive.jsonl", "math"),
        ("MMLU_PRO", "multiple_choice"),
        ("gpqa_diamond", "multiple_choice"),
        ("", "math"),
        ("my-arc", "math"),
    ],
)
def test_patterns_select_the_reward_function_by_source(source, judge):
    from trapo_jax.config import Config

    patterns = Config().rewards.replacements(["math"])
    assert Config().rewards.replacements(["my_rewards:exact"]) == {}
    with make_grader(["math"], by_source=patterns, **PATIENT) as grader:
        grade = grader.submit(r"\boxed{B}", problem("B", source)).result()
    assert list(grade.judgments) == [judge]
    assert grade.is_correct


def test_functions_may_be_async_import_modules_or_fail():
    names = [
        f"{MODULE}:{name}" for name in ("asynchronous", "needs_numpy", "any_column", "returns_text")
    ]
    with make_grader(names, **PATIENT) as grader:
        grade = grader.submit("42", problem(hint="h", level=3)).result()
    rewards = {name: judgment.reward for name, judgment in grade.judgments.items()}
    assert rewards == {
        "asynchronous": 1.0,
        "needs_numpy": 0.5,
        "any_column": 1.0,
        "returns_text": None,
    }
    assert grade.missing == {
        "returns_text": "InvalidReward: the function returned 'splendid'; expected a number in [0, 1] or a verdict"
    }


@pytest.mark.slow
def test_a_function_that_sleeps_times_out():
    names = [f"{MODULE}:shortness", f"{MODULE}:sleeps"]
    with make_grader(names, num_workers=1, timeout_secs=5.0) as grader:
        grade = grader.submit("42", problem()).result()
    assert grade.missing == {"sleeps": "timeout"}
    assert grade.reward == 0.98


def test_only_named_environment_variables_reach_a_function(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    monkeypatch.setenv("OTHER_TOKEN", "secret")
    name = f"{MODULE}:sees_tokens"
    with make_grader([name], environment=["JUDGE_TOKEN"], **PATIENT) as grader:
        assert grader.submit("", problem()).result().answer == "JUDGE_TOKEN"


def test_functions_with_the_same_name_are_distinguished():
    names = [f"{MODULE}:shortness", "support.more_reward_functions:shortness"]
    with make_grader(names, **PATIENT) as grader:
        assert list(grader.submit("42", problem()).result().judgments) == names


def test_a_function_that_is_not_at_the_top_level_is_rejected():
    with pytest.raises(ValueError, match="top level"):
        Grader([WeightedFunction("f", lambda response, problem: 1.0)])
    with pytest.raises(UserError, match="not a function defined at the top level of its module"):
        make_grader([f"{MODULE}:NESTED"])


def test_inline_functions_return_immediately_and_never_raise(caplog):
    function = WeightedFunction("raises", reward_functions.raises, is_inline=True)
    with Grader([function]) as grader:
        for _ in range(3):
            future = grader.submit("42", problem())
            assert future.done()
            assert future.result().missing == {"raises": "ValueError: no"}
    assert caplog.messages == ["reward function raises: ValueError: no"]


def test_pending_grades_are_canceled_on_close():
    with make_grader([f"{MODULE}:sleeps"], num_workers=1, timeout_secs=0.5) as grader:
        futures = [grader.submit("42", problem()) for _ in range(20)]
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) >= 18
