"""The letter a response settles on; strict where it names two or none."""

import pytest

from trapo_jax.rewards import extract_choice, grade_multiple_choice
from trapo_jax.types import Problem, Verdict


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{(B)}.<|im_end|>", "B"),
        (r"\boxed{\text{J}}", "J"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{C. 12 cm}", "C"),
        (r"\boxed{C) 12 cm}", "C"),
        (r"Answer: A, no, $\boxed{B}$", "B"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
        ("The answer is (A)", "A"),
        ("The answer is A.", "A"),
        ("The correct answer is: D<|eot_id|>", "D"),
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
        # Two letters, none, or a letter that is a word.
        (r"\boxed{A, B}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{K}", None),
        (r"\boxed{b}", None),
        (r"\boxed{}", None),
        (r"\boxed{12}", None),
        ("The answer is A or B.", None),
        ("The answer is (A) and (C).", None),
        ("Answer: A, B", None),
        ("The answer is A/B", None),
        ("The answer is A good question.", None),
        ("The answer is Apple", None),
        ("The answer is a", None),
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
    assert grade_multiple_choice("Answer: B", problem) is Verdict.CORRECT
    assert grade_multiple_choice("Answer: C", problem) is Verdict.WRONG
    assert grade_multiple_choice("no idea", problem) is Verdict.WRONG


@pytest.mark.parametrize("answer", ["", "K", "12", "AB", "b"])
def test_a_problem_whose_answer_is_no_letter_is_an_error(answer):
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
    """A quadratic search would take hours: the timeout of pyproject.toml would end it."""
    extract_choice(text)
