"""Builds grades from a single reward function."""

from trapo_jax.types import Grade, Judgment


def grade_of(reward: float | None, reason: str = "") -> Grade:
    """Returns a grade. If `reward` is None, it is missing, and `reason` states why."""
    return Grade(reward, {"test": Judgment(reward, reason=reason)})


CORRECT, WRONG = grade_of(1.0), grade_of(0.0)
ERROR, TIMEOUT = grade_of(None, "ValueError"), grade_of(None, "timeout")
