"""Defines the reward function of the built-in card-shuffles task."""

import re
from collections.abc import Callable

from trapo_jax.types import Problem, Verdict


def card_shuffles_grader(eos_text: str) -> Callable[[str, Problem], tuple[Verdict, str | None]]:
    """Returns the reward function of the card-shuffles task.

    A response is correct if it ends with `#`, the five-digit answer, and EOS, and contains no other `#`. Responses must
    include special tokens, because an answer without EOS is wrong.
    """
    ending = re.compile(rf"#([0-9]{{5}}){re.escape(eos_text)}\Z")

    def grade(response: str, problem: Problem) -> tuple[Verdict, str | None]:
        match = ending.search(response)
        answer = match[1] if match else None
        is_correct = answer == problem.answer and response.count("#") == 1
        return Verdict.CORRECT if is_correct else Verdict.WRONG, answer

    return grade
