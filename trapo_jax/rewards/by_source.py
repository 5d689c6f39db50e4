"""For data sets that mix mathematics and multiple choice."""

from trapo_jax.rewards.math import grade_math, warm_up
from trapo_jax.rewards.multiple_choice import grade_multiple_choice
from trapo_jax.types import Problem, Verdict

__all__ = ["MULTIPLE_CHOICE_SOURCES", "grade_by_source", "warm_up"]

MULTIPLE_CHOICE_SOURCES = ("arc", "mmlu", "gpqa")


def grade_by_source(response_text: str, problem: Problem) -> Verdict:
    """Multiple choice if the problem's source begins with one of MULTIPLE_CHOICE_SOURCES, else
    mathematics. Raises what they raise."""
    if problem.source.lower().startswith(MULTIPLE_CHOICE_SOURCES):
        return grade_multiple_choice(response_text, problem)
    return grade_math(response_text, problem)
