"""Grades as a single reward function would give them."""

from trapo_jax.types import Grade, Judgment


def grade_of(reward: float | None, reason: str = "") -> Grade:
    """Returns a grade; `reward` is None for a missing one, and `reason` says why it is missing."""
    return Grade(reward, {"test": Judgment(reward, reason=reason)})


CORRECT, WRONG = grade_of(1.0), grade_of(0.0)
ERROR, TIMEOUT = grade_of(None, "ValueError"), grade_of(None, "timeout")
