"""Tests that extraction, normalization, and grading never fail, whatever the response or the answer."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.any_input import TEXTS
from trapo_jax.rewards import extract_choice, is_text, make_grader
from trapo_jax.rewards.extraction import final_part, last_boxed
from trapo_jax.rewards.math import extract_math_answer, gold_answer, grade_math
from trapo_jax.rewards.notation import read_answer
from trapo_jax.types import Problem, Verdict

# Pieces of responses and answers. Powers and factorials are missing because evaluating them may take forever; they are
# tested only in the grader's processes, which can be killed.
PIECES = st.sampled_from(
    [
        *"0123456789.,:;=+-/()[]{}|<>$%&'\"\\ \n\t_xyzABC°½π√∞≤∈∪²₁\u200b\ufeff\0\ud800",
        *(
            "\\boxed{",
            "\\boxed ",
            "\\frac",
            "\\frac{1}{2}",
            "\\sqrt{",
            "\\text{",
            "\\left(",
            "\\right]",
            "\\%",
        ),
        *(
            "####",
            "the answer is ",
            "Answer: ",
            "**",
            "<think>",
            "</think>",
            "<|im_end|>",
            "\\cup",
            "\\pm",
            "\\$",
        ),
        *(
            "1e5",
            "10:30",
            "dollars",
            " and ",
            "(A)",
            "\\infty",
            "\\begin{pmatrix}",
            "\\end{pmatrix}",
            "&",
            "\\\\",
        ),
    ]
)
RESPONSES = st.lists(PIECES, max_size=12).map("".join) | TEXTS


@settings(max_examples=400)
@given(response=RESPONSES)
def test_any_response_has_an_answer_or_none(response):
    for extract in (extract_math_answer, extract_choice, last_boxed):
        answer = extract(response)
        assert answer is None or isinstance(answer, str)
    assert final_part(response) in response
    assert isinstance(is_text(response), bool)
    assert isinstance(read_answer(response).text, str)


@given(response=RESPONSES, answer=RESPONSES | st.sampled_from("AbJ"))
def test_any_response_is_graded(response, answer):
    with make_grader(["multiple_choice", "card_shuffles"]) as grader:
        grade = grader.submit(response, Problem("0" * 16, (), answer)).result()
    assert grade.reward is None or 0 <= grade.reward <= 1
    assert grade.missing.keys() <= {"multiple_choice"}  # the problem's answer must be a letter


@settings(max_examples=200)
@given(response=RESPONSES.map(lambda text: "\\boxed{" + text + "}"), answer=RESPONSES)
def test_any_answer_is_right_or_wrong(response, answer):
    try:
        gold_answer(answer)
    except ValueError:  # The answer is empty; such problems are dropped.
        return
    verdict, _ = grade_math(response, Problem("0" * 16, (), answer))
    assert verdict in (Verdict.CORRECT, Verdict.WRONG)
