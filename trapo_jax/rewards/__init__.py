"""Provides reward functions, which map the text of a response to a reward in [0, 1].

A reward function is a plain function `(response, problem, **columns)`. It returns a number in [0, 1], a bool, or a
`Verdict`; or a pair of one of these and the extracted answer. A `Grader` combines one or more reward functions and
returns futures. Functions that a hostile response could keep busy run in the processes of a `GraderPool`.
"""

from trapo_jax.rewards.card_shuffles import card_shuffles_grader
from trapo_jax.rewards.grader import (
    REWARD_FUNCTIONS,
    Grader,
    WeightedFunction,
    make_grader,
    special_tokens,
)
from trapo_jax.rewards.judgments import InvalidReward, describe_reasons, kind_of
from trapo_jax.rewards.math import (
    ANSWER_FORMS,
    answer_form,
    answer_forms,
    extract_math_answer,
    grade_math,
    grade_math_lenient,
    is_sentence,
    is_text,
)
from trapo_jax.rewards.multiple_choice import extract_choice, grade_multiple_choice
from trapo_jax.rewards.pool import GraderPool

__all__ = [
    "ANSWER_FORMS",
    "REWARD_FUNCTIONS",
    "Grader",
    "GraderPool",
    "InvalidReward",
    "WeightedFunction",
    "answer_form",
    "answer_forms",
    "card_shuffles_grader",
    "describe_reasons",
    "extract_choice",
    "extract_math_answer",
    "grade_math",
    "grade_math_lenient",
    "grade_multiple_choice",
    "is_sentence",
    "is_text",
    "kind_of",
    "make_grader",
    "special_tokens",
]
