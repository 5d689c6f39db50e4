"""Mathematical answers: which part of a response is the answer, and what equals what."""

import pytest

from support.commands import REPOSITORY
from trapo_jax.rewards import GraderPool, extract_math_answer, grade_math
from trapo_jax.rewards.math import MAX_ANSWER_CHARS, equivalent
from trapo_jax.types import Problem, Verdict

MATH_500 = REPOSITORY.parent / "shared" / "data" / "valid.math.parquet"
SHARED = "/work/shared/data/valid.math.parquet"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\\boxed{3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off in the last box
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"{\boxed{8}", "8"),
        (r"}\boxed{8}", "8"),
        (r"\boxed{9}<|im_end|>", "9"),
        (r"\boxed{9}</s><|endoftext|>", "9"),
        ("six times seven\n#### 42", "42"),
        ("#### 1\n####  1,234 <|im_end|>", "1,234"),
        ("#### $5$", "5"),
        (r"#### 1" + "\n" + r"\boxed{2}", "2"),
        ("The answer is 7.", "7"),
        ("The answer is: $7$, as asked.", "7"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Answer:** 3.5", "3.5"),
        ("Answer: \\(x=3\\)<|im_end|>", "x=3"),
        ("the answer is 3. Wait. The answer is 4.", "4"),
        ("I think it is 42", None),
        ("12 + 30 = 42", None),
        (r"\boxed{", None),
        ("", None),
        ("\\boxed", None),
        ("<|im_end|>", None),
    ],
)
def test_answer_of_a_response(response, answer):
    assert extract_math_answer(response) == answer


EQUAL = [
    ("1/2", "0.5"),
    (r"\frac12", "1/2"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"),
    ("$\\frac{1}{2}$", "0.5"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    ("so 42\n#### 42", "42"),
    ("1,000", "1000"),
    ("1000", "1{,}000"),
    ("3", "3.0"),
    ("-3", "−3"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("1,2", "2,1"),
    ("[1,2)", "[1, 2)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty, 1) \cup (2, \infty)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"5\text{ cm}", "5"),
    ("5", r"5\text{ cm}"),
    (r"\$5", "5"),
    (r"90^\circ", "90"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    ("50%", r"50\%"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x = 5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\text{evelyn}"),
    (r"\text{(B)}", "B"),
    ("no solution", r"\text{No solution}"),
    ("6 - 5i", "-5i + 6"),
]
DIFFERENT = [
    ("1/2", "0.6"),
    ("42", "-42"),
    ("42", "421"),
    (r"\frac13", "0.33"),
    (r"\pi", "3.14"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x^2", "y^2"),
    (r"\text{Evelyn}", r"\text{Angela}"),
    ("42", r"\text{forty-two}"),
    ("42", r"\frac{"),
    ("42", "42, 43"),
    ("42", "41 or 42"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert equivalent(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equivalent(gold, answer)


def test_order_of_gold_and_answer_matters():
    """An answer may give the set of an inequality's solutions, but not an inequality for a set."""
    assert equivalent(r"1 \le x < 2", "[1,2)")
    assert not equivalent("[1,2)", r"1 \le x < 2")


def verdict(response, answer):
    return grade_math(response, Problem("", (), answer))


def test_verdicts():
    assert verdict(r"so $x = \boxed{0.5}$<|im_end|>", r"\frac12") is Verdict.CORRECT
    assert verdict(r"so $x = \boxed{0.6}$<|im_end|>", r"\frac12") is Verdict.WRONG
    assert verdict("no idea", r"\frac12") is Verdict.WRONG
    assert verdict(r"\boxed{}", r"\frac12") is Verdict.WRONG
    assert verdict(r"\boxed{" + "1" * (MAX_ANSWER_CHARS + 1) + "}", "1") is Verdict.WRONG


@pytest.mark.parametrize("answer", ["", " ", "$", r"\boxed{}"])
def test_a_problem_without_an_answer_is_an_error(answer):
    with pytest.raises(ValueError, match="empty or cannot be read"):
        verdict(r"\boxed{1}", answer)


def math_500_golds():
    parquet = pytest.importorskip("pyarrow.parquet")
    for path in (MATH_500, SHARED):
        try:
            rows = parquet.read_table(path).to_pylist()
        except FileNotFoundError:
            continue
        return [row["reward_model"]["ground_truth"] for row in rows]
    pytest.skip("valid.math.parquet (MATH-500 in the verl schema) is not in ../shared/data")


def test_every_answer_of_math_500_verifies_against_itself_and_no_wrong_one_does():
    golds = math_500_golds()
    assert len(golds) == 500
    pairs = [(golds[i], golds[i]) for i in range(500)] + [
        (golds[i], golds[i - 1]) for i in range(500)
    ]
    with GraderPool(grade_math, num_workers=2, timeout_secs=30.0) as pool:
        futures = [
            pool.submit(rf"Thus $x = \boxed{{{answer}}}$.<|im_end|>", Problem("", (), gold))
            for gold, answer in pairs
        ]
        verdicts = [future.result() for future in futures]
    assert [g for g, v in zip(golds, verdicts, strict=False) if v is not Verdict.CORRECT] == []
    right_by_chance = {
        (gold, answer)
        for (gold, answer), v in zip(pairs[500:], verdicts[500:], strict=True)
        if v is Verdict.CORRECT
    }
    assert right_by_chance == {("x=5", "5"), ("7", "7"), ("3", "3")}
    assert {Verdict.CORRECT, Verdict.WRONG} == set(verdicts)  # and no errors
