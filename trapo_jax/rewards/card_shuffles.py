"""The grader of the embedded task."""

import re
from collections.abc import Callable

from trapo_jax.types import Problem, Verdict


def card_shuffles_grader(eos_text: str) -> Callable[[str, Problem], Verdict]:
    """Correct if the response ends in exactly `#ddddd` and EOS with the right digits and has one `#`.

    The response is prefix and completion with special tokens spelled out, so that an answer the
    model did not end is wrong.
    """
    ending = re.compile(rf"#([0-9]{{5}}){re.escape(eos_text)}\Z")

    def verify(response_text: str, problem: Problem) -> Verdict:
        match = ending.search(response_text)
        right = match is not None and match[1] == problem.answer and response_text.count("#") == 1
        return Verdict.CORRECT if right else Verdict.WRONG

    return verify
