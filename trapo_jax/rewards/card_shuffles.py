"""The grader of the embedded task."""

import re
from collections.abc import Callable

from trapo_jax.types import Problem, Verdict


def card_shuffles_grader(eos_text: str) -> Callable[[str, Problem], tuple[Verdict, str | None]]:
    """Returns a reward function: a response is correct if it ends in exactly `#ddddd` and EOS, and has one `#`.

    The response includes special tokens, so that an answer that the model did not end is wrong.
    """
    ending = re.compile(rf"#([0-9]{{5}}){re.escape(eos_text)}\Z")

    def grade(response: str, problem: Problem) -> tuple[Verdict, str | None]:
        match = ending.search(response)
        answer = match[1] if match else None
        is_correct = answer == problem.answer and response.count("#") == 1
        return Verdict.CORRECT if is_correct else Verdict.WRONG, answer

    return grade
