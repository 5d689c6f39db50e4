"""Turns what a reward function returns into a verdict."""

from typing import Any

from trapo_jax.types import Verdict


def as_verdict(value: Any) -> Verdict:
    """Returns the verdict that a reward function's result stands for.

    Args:
      value: a `Verdict` or its value, a bool, or a reward of 0 or 1.

    Raises:
      ValueError: for anything else, such as a reward between 0 and 1.

    >>> as_verdict(True), as_verdict(0.0), as_verdict("timeout")
    (<Verdict.CORRECT: 'correct'>, <Verdict.WRONG: 'wrong'>, <Verdict.TIMEOUT: 'timeout'>)
    """
    if isinstance(value, str):
        return Verdict(value)
    if value in (0, 1):
        return Verdict.CORRECT if value else Verdict.WRONG
    raise ValueError(
        f"a reward function returned {value!r}, which is neither 0 nor 1 nor a verdict"
    )
