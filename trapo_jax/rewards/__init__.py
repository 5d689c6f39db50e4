"""Graders: from a response's text to a verdict.

A `RewardFunction` is a plain function `(response_text, problem) -> Verdict`. The loop does not call it but a
`Grader`, which hands out futures: `InlineGrader` for functions that are quick on any text,
`GraderPool` for those that a hostile text can hold, each in processes that are killed at a deadline.
"""

from trapo_jax.rewards.by_source import grade_by_source
from trapo_jax.rewards.card_shuffles import card_shuffles_grader
from trapo_jax.rewards.grader import GRADERS, Grader, InlineGrader, RewardFunction, make_grader
from trapo_jax.rewards.math import extract_math_answer, grade_math
from trapo_jax.rewards.multiple_choice import extract_choice, grade_multiple_choice
from trapo_jax.rewards.pool import GraderPool
from trapo_jax.types import REWARDS

__all__ = [
    "GRADERS",
    "REWARDS",
    "Grader",
    "GraderPool",
    "InlineGrader",
    "RewardFunction",
    "card_shuffles_grader",
    "extract_choice",
    "extract_math_answer",
    "grade_by_source",
    "grade_math",
    "grade_multiple_choice",
    "make_grader",
]
