"""Builds grades for a single reward function named `test`."""

from trapo_jax.types import Grade, Judgment


def grade_of(reward: float | None, reason: str = "") -> Grade:
    """Returns a grade with the given reward. A `reward` of None is a missing reward, and `reason` states its cause."""
    return Grade(reward, {"test": Judgment(reward, reason=reason)})


CORRECT, WRONG = grade_of(1.0), grade_of(0.0)
ERROR, TIMEOUT = grade_of(None, "ValueError"), grade_of(None, "timeout")
