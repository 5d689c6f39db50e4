"""Tests the extraction of the chosen letter. Responses without a letter or with several letters have no answer."""

import pytest

from trapo_jax.rewards import extract_choice, grade_multiple_choice
from trapo_jax.types import Problem, Verdict


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{(B)}.", "B"),
        (r"\boxed{\text{J}}", "J"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{C. 12 cm}", "C"),
        (r"\boxed{C) 12 cm}", "C"),
        (r"Answer: A, no, $\boxed{B}$", "B"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
        ("The answer is (A)", "A"),
        ("The answer is A.", "A"),
        ("The correct answer is: D", "D"),
        ("Answer: B", "B"),
        ("**Answer:** C", "C"),
        ("**Answer: C**", "C"),
        ("Answer: (C) because it is the largest", "C"),
        ("the answer is I because of this", "I"),
        ("The correct option is E.", "E"),
        ("The correct choice is option F.", "F"),
        ("The answer is A. No: the answer is B.", "B"),
        ("B", "B"),
        (" (B).", "B"),
        ("B. 12 cm", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{B - Paris}", "B"),
        (r"\boxed{\textbf{(D)}\ 12}", "D"),
        (r"\boxed{$\mathbf{C}$}", "C"),
        (r"$\mathbf{C}$", "C"),
        (r"\boxed{\text{Option D}}", "D"),
        ("Option B", "B"),
        ("b) Paris", "B"),
        ("**B**", "B"),
        ("The answer is b.", "B"),
        ("the answer is (c) because it is", "C"),
        ("The answer is B - Paris.", "B"),
        # Two letters, no letter, or a letter that is used as a word
        (r"\boxed{A, B}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{K}", None),
        (r"\boxed{}", None),
        (r"\boxed{12}", None),
        ("The answer is A or B.", None),
        ("The answer is (A) and (C).", None),
        ("Answer: A, B", None),
        ("The answer is A/B", None),
        ("The answer is A good question.", None),
        ("The answer is Apple", None),
        ("the answer is a good one", None),
        (r"\boxed{a good one}", None),
        (r"<think>\boxed{B}", None),
        ("A is wrong and B is right", None),
        ("answer", None),
        ("", None),
    ],
)
def test_letter_of_a_response(response, letter):
    assert extract_choice(response) == letter


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", " B "])
def test_verdicts(answer):
    problem = Problem("", (), answer)
    assert grade_multiple_choice("Answer: B", problem) == (Verdict.CORRECT, "B")
    assert grade_multiple_choice("Answer: C", problem) == (Verdict.WRONG, "C")
    assert grade_multiple_choice("no idea", problem) == (Verdict.WRONG, None)


@pytest.mark.parametrize("answer", ["", "K", "12", "AB"])
def test_a_problem_whose_answer_is_not_a_letter_raises_an_error(answer):
    with pytest.raises(ValueError, match="not a letter"):
        grade_multiple_choice("Answer: B", Problem("", (), answer))


@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 1_000_000,
        "answer " * 200_000,
        "\\boxed{" * 200_000,
        "{" * 1_000_000,
        "}" * 1_000_000,
        "<|" * 500_000,
        "answer: A" + " " * 1_000_000,
    ],
)
def test_long_texts_take_linear_time(text):
    """A quadratic search would take hours, so the timeout in pyproject.toml would end the test."""
    extract_choice(text)
