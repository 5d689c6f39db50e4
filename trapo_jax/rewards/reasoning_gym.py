r"""Grades answers to problems of reasoning-gym's tasks (extra `tasks`) with the function that each task defines.

The answer is extracted as by `grade_math`: from a box, after `####`, or after "the answer is". It must run in a process
that can be killed, because the functions of some tasks may run for a long time on hostile answers.
"""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from trapo_jax.rewards.math import MAX_ANSWER_CHARS, equivalent, extract_math_answer
from trapo_jax.types import Problem, UserError, Verdict

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
TEXT = re.compile(r"\\text(?:tt|rm|bf|it)?\{([^{}]*)\}")
FULL_SCORE = 1.0


def grade_reasoning_gym(
    response: str, problem: Problem, metadata: Mapping[str, Any]
) -> tuple[Verdict, str | None]:
    """Scores a response's answer; partial scores count as wrong.

    Args:
      response: any text without special tokens.
      problem: the problem; its `source` is the name of the task.
      metadata: the item's metadata, from which many tasks compute the score.

    Returns:
      The verdict and the extracted answer. The verdict is also WRONG if the response has no answer, or one of more than
      MAX_ANSWER_CHARS characters. A number equal to the problem's answer is CORRECT, however it is written.
    """
    answer = extract_math_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Verdict.WRONG, answer
    if NUMBER.fullmatch(problem.answer) and equivalent(problem.answer, answer):
        return Verdict.CORRECT, answer
    answer = TEXT.sub(r"\1", answer).strip()
    is_correct = score(problem.source, answer, problem.answer, metadata) == FULL_SCORE
    return Verdict.CORRECT if is_correct else Verdict.WRONG, answer


def score(task: str, answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """Returns a task's score of an answer in [0, 1]; 0 if its function cannot read the answer."""
    try:
        return float(_scorer(task)(answer, {"answer": gold, "metadata": metadata}))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return 0.0  # Some tasks raise an error for answers in another format.


def import_reasoning_gym() -> ModuleType:
    """Imports reasoning-gym, which takes seconds.

    Raises:
      UserError: if it is not installed.
    """
    if not find_spec("reasoning_gym"):
        raise UserError("reasoning-gym is not installed; pip install 'trapo-jax[tasks]'")
    with warnings.catch_warnings():  # raised by its imports the first time
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


@functools.cache
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    return import_reasoning_gym().get_score_answer_fn(task)


def warm_up() -> None:
    """Imports reasoning-gym and sympy."""
    import_reasoning_gym()
    equivalent("x + 1", "x + 2")
