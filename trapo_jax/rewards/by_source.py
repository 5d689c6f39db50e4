"""For data sets that mix mathematics and multiple choice."""

from trapo_jax.rewards.math import verify_math, warm_up
from trapo_jax.rewards.multiple_choice import verify_multiple_choice
from trapo_jax.types import Problem, Verdict

__all__ = ["MULTIPLE_CHOICE_SOURCES", "verify_by_source", "warm_up"]

MULTIPLE_CHOICE_SOURCES = ("arc", "mmlu", "gpqa")


def verify_by_source(response_text: str, problem: Problem) -> Verdict:
    """Multiple choice if the problem's source begins with one of MULTIPLE_CHOICE_SOURCES, else
    mathematics. Raises what they raise."""
    if problem.source.lower().startswith(MULTIPLE_CHOICE_SOURCES):
        return verify_multiple_choice(response_text, problem)
    return verify_math(response_text, problem)
