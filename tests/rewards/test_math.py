"""Tests the extraction of math answers from responses and the equivalence of answers."""

import json

import pytest

from support.commands import REPOSITORY
from trapo_jax.rewards import (
    GraderPool,
    extract_math_answer,
    grade_math,
    grade_math_lenient,
    is_text,
)
from trapo_jax.rewards.math import MAX_ANSWER_CHARS, equivalent
from trapo_jax.types import Problem, Verdict

SHARED = REPOSITORY.parent / "shared"
MATH_500 = (SHARED / "data" / "valid.math.parquet", "/work/shared/data/valid.math.parquet")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\\boxed{3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} and then \boxed{6", "5"),  # truncated inside the last box
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"{\boxed{8}", "8"),
        (r"}\boxed{8}", "8"),
        (r"\framebox{9}", "9"),
        (r"\boxed 9", "9"),
        (r"$\boxed{9}$, $\boxed{8}$", "9, 8"),
        (r"\boxed{9}. Wait, that is wrong: \boxed{8}", "8"),
        (r"<think>\boxed{9}", None),
        (r"<think>no</think>\boxed{9}", "9"),
        (r"<think>\boxed{8}</think>\boxed{9}", "9"),
        ("six times seven\n#### 42", "42"),
        ("#### 1\n####  1,234 ", "1,234"),
        ("#### $5$", "5"),
        (r"#### 1" + "\n" + r"\boxed{2}", "2"),
        ("The answer is 7.", "7"),
        ("The answer is: $7$, as asked.", "7"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Answer:** 3.5", "3.5"),
        ("Answer: \\(x=3\\)", "x=3"),
        ("the answer is 3. Wait. The answer is 4.", "4"),
        ("I think it is 42", None),
        ("12 + 30 = 42", None),
        (r"\boxed{", None),
        ("", None),
        ("\\boxed", None),
    ],
)
def test_answer_of_a_response(response, answer):
    assert extract_math_answer(response) == answer


EQUAL = [
    ("40_9", "40"),
    (r"x = \begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
    (r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"x = \begin{pmatrix}-1\\2\end{pmatrix}"),
    ("x(t) + 1", "1 + x(t)"),
    (r"\frac{dx}{dt}=3x", r"\frac{dx}{dt} = 3x"),
    ("1/2", "0.5"),
    (r"\frac12", "1/2"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"$\frac{1}{2}$", "0.5"),
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
    ("0.333333", r"\frac13"),
    (r"\frac{1}{3}", "0.3333333"),
    ("6.02e23", r"6.02\times10^{23}"),
    ("6.02e23", "602000000000000000000000"),
    ("1.5e-3", "0.0015"),
    ("1.5e-3", r"\frac{3}{2000}"),
    (r"3\times 10^8", "3e8"),
    ("3e8", "300,000,000"),
    ("1e5", "100000"),
    ("1E5", "100000"),
    ("-2.5e-4", r"-2.5\cdot10^{-4}"),
    ("1e-10", "10^{-10}"),
    ("7", "x=7"),
    ("7", "x = 7.0"),
    ("7", "n=7"),
    ("7", "f(2)=7"),
    ("7", "P(A) = 7"),
    ("(1,2)", "(x,y)=(1,2)"),
    ("5", "AB = 5"),
    ("5", r"\text{Area} = 5"),
    ("5", "2+3=5"),
    ("5", r"x=\frac{10}{2}=5"),
    ("12", r"12\text{ apples}"),
    ("12", r"12\,\text{cm}"),
    ("12", r"12\mathrm{~cm}^2"),
    ("12 cm", "12"),
    ("12 cm", "12 centimeters"),
    ("45", r"45^{\circ}"),
    ("45", "45 degrees"),
    (r"\frac{\pi}{4}", r"45^\circ"),
    ("15", "$15"),
    ("15", r"\$15.00"),
    ("15", "15 dollars"),
    ("€15", "15 euros"),
    ("1500", "€1,500"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("50%", r"\frac12"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("12.5%", r"12.5\%"),
    (r"12.5\%", "12.5 percent"),
    (r"5\frac{1}{2}", "5.5"),
    ("5 1/2", "11/2"),
    ("5.5", r"5\frac12"),
    ("-5 1/2", "-5.5"),
    ("10000", "10,000"),
    ("10000", "10{,}000"),
    ("10000", r"10\,000"),
    ("10000", "10 000"),
    ("1234567", "1,234,567"),
    ("0.25", r"25\%"),
    ("√2", r"\sqrt2"),
    ("√3/2", r"\frac{\sqrt{3}}{2}"),
    ("π/4", r"\frac{\pi}{4}"),
    ("−7", "-7"),
    ("2π", r"2\pi"),
    ("½", "0.5"),
    ("3½", "3.5"),
    ("2×3", "6"),
    ("x²+1", "x^2+1"),
    ("x²", "x^{2}"),
    (r"x \ge 3", "x≥3"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("x^2-1", "(x-1)(x+1)"),
    ("sin(x)^2+cos(x)^2", "1"),
    ("e^{2x}", r"\exp(2x)"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    ("1,2,3", "3,2,1"),
    ("1, 2", "1 and 2"),
    ("x=1, x=2", "1, 2"),
    ("1,2", "x=1 or x=2"),
    (r"\pm 3", "3, -3"),
    ("3,-3", r"\pm3"),
    (r"\{1,2\}", "1,2"),
    (r"1\pm\sqrt2", r"1+\sqrt{2}, 1-\sqrt{2}"),
    ("[0,1)", r"0 \le x < 1"),
    (r"0\le x<1", "[0,1)"),
    ("x>3", r"(3,\infty)"),
    (r"(3,\infty)", "x>3"),
    (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or x>1"),
    (r"(-\infty,2]", r"x \leq 2"),
    ("x < 3", "3 > x"),
    ("y=2x+1", "2x+1"),
    ("y=2x+1", "2x - y + 1 = 0"),
    ("x+y=3", "2x+2y=6"),
    ("x^2+y^2=4", "x^2 + y^2 - 4 = 0"),
    ("3:4", "3:4"),
    ("3:4", r"\frac34"),
    ("3:30", "3:30"),
    ("3:30 PM", "3:30 p.m."),
    ("12:00", "12:00"),
    ("1:2:3", "1 : 2 : 3"),
    ("10:50", "10:50 AM"),
    ("10:50", "at 10:50"),
    ("1:2", r"1:\frac{4}{2}"),
    (r"1:\sqrt{2}", r"1:\sqrt{2}"),
    ("3:4", "3 cm : 4 cm"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("Evelyn", r"\text{Evelyn}"),
    ("yes", "Yes"),
    (r"\text{no solution}", "No solution."),
    ("even", "even"),
    ("D", r"\textbf{(D)}\ 12"),
    ("D", "(D)"),
    ("D", r"\text{D}"),
    ("D", r"\mathbf{D}"),
    ("12", r"\textbf{(D)}\ 12"),
    ("B", "(B) Paris"),
    ("0.1428", r"\approx 0.1428"),
    ("3.14", r"\pi \approx 3.14"),
    (r"\pi", r"\pi \approx 3.14"),
    (r"x \neq 4", r"x \ne 4"),
    (r"x\neq4", "x≠4"),
    ("2^{10}", "1024"),
    ("1e999", "1e999"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", "1/6"),
    (r"\sqrt[3]{2}", "2^{1/3}"),
    ("(n-2) 2^{n}+1", "2^n(n-2)+1"),
    (r"\frac{1}{2n+2}", r"\frac{1}{2(n+1)}"),
    ("1+2i", "2i+1"),
    ("i", "i"),
    ("104", "**104**"),
    ("104", "104."),
    ("104", "104,"),
    ("12", r"\textbf{12}"),
    ("12", r"\mathbf{12}"),
    ("-1", "-1.0"),
    ("(-1,2)", "(-1, 2)"),
    (r"\langle1,2\rangle", "(1,2)"),
    ("2516_8", "2516_8"),
    (r"\emptyset", r"\varnothing"),
    (r"\infty", "infinity"),
    ("10 million", "10,000,000"),
    ("2 dozen", "2 dozen"),
    ("1:30", "1:30"),
    (r"x=\frac12", "0.5"),
    (r"\frac{3}{4}", "3/4"),
    ("0.75", "3/4"),
    ("1.50", "1.5"),
    ("$1.50", "1.50"),
    ("72", "72 students in total"),
    ("7 hours", "7 h"),
    ("12", "12 m"),
    (r"9 \text{ miles per hour}", "9 mph"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("-1/2", r"-\dfrac{1}{2}"),
    ("3 + 4", "7"),
    ("a+b", "b+a"),
    ("2ab", "2ba"),
    ("x_1", "x_{1}"),
]
DIFFERENT = [
    (r"\frac{12}{5}", r"\frac{1}{25}"),
    ("23", r"2 \cdot 3"),
    ("23", "2 3"),
    ("40", "40_9"),
    ("x_{12}", "x_{1}2"),
    (r"x^{\prime}+r x(t)=0", r"x^{\prime}+2 r x(t)=0"),
    (r"\frac{dx}{dt}=3x", r"\frac{dy}{dt}=3y"),
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
    ("1/2", "0.51"),
    ("1/3", "0.33"),
    ("2^{-98}", "2^{-99}"),
    ("1.6e-19", "9.1e-31"),
    ("1e-20", "0"),
    ("1e-20", "2e-20"),
    (r"\frac{1}{2004!}", "0"),
    ("3:30", "1:10"),
    ("3:30", "3:31"),
    ("10:50", "10:15 + 35"),
    ("10:50", "10:15 + 35 = 50 minutes"),
    ("1:4", r"1:2 \times 2"),
    ("3:4", "6:9"),
    ("5", "2x+1=5"),
    ("5", "x^2=5"),
    ("5", "x+y=5"),
    ("5", r"\sqrt{x}=5"),
    ("1", "x^2/2-y^2/2=1"),
    ("5", "x>5"),
    (r"x \neq 4", "a<0"),
    ("x<4", r"x \le 4"),
    ("x<4", "x>4"),
    ("[0,1]", "(0,1)"),
    ("1,2", "1,2,3"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("12 cm", "12 m"),
    ("12 cm", "13 cm"),
    ("12 cm^2", "12 cm"),
    ("€15", "$16"),
    ("50%", "5"),
    ("0.5", "0.5%"),
    ("50", "0.5"),
    ("5 1/2", "5.2"),
    ("10000", "10,0000"),
    ("10000", "1000"),
    ("42", "43"),
    (r"\sqrt2", "1.41"),
    (r"\pi", "22/7"),
    ("x^2", "x^3"),
    ("x", "2x"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    ("Evelyn", "Eve"),
    ("yes", "no"),
    ("no solution", "0"),
    ("12:00", "0"),
    ("12:00", "12"),
    ("1e999", "2e999"),
    ("1e999", "inf"),
    ("1e999", r"\infty"),
    ("x=5", "y=5"),
    ("x=5", "x=-5"),
    ("y=2x+1", "y=2x-1"),
    ("x+y=3", "x+y=4"),
    ("x<-1", "x<1"),
    ("D", "A"),
    ("D", r"\textbf{(A)}\ 12"),
    ("12", r"\textbf{(D)}\ 13"),
    ("6.02e23", "6.02e22"),
    ("100", "1e3"),
    ("5", r"5\cdot 10^2"),
    ("1+2i", "1-2i"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)"),
    ("7", "x = 7 or x = 8"),
    ("3", "3 = 4"),
    ("3", "3x"),
    ("2", r"2\pi"),
    ("30", "30!"),
    ("0.5", "-0.5"),
    ("2516_8", "2516_9"),
    ("3", "3/0"),
    ("1", r"\frac{1}{"),
    ("7", "70%"),
    (r"45^\circ", r"54^\circ"),
    ("a", "b"),
    ("x(x+1)", "x(x-1)"),
    (r"\frac{x}{y}", r"\frac{y}{x}"),
    ("1000000", "1000001"),
    ("123456789.5", "123456789.6"),
    ("1000000.0", "1000001.0"),
    ("1.000001", "1.000002"),
    ("0.0000001", "0.0000002"),
    ("10^{-7}", r"2\cdot10^{-7}"),
    (r"\{2^{-99}\}", r"\{2^{-98}\}"),
    ("(2^{-99},1)", "(2^{-98},1)"),
    ("x 2^{-99}", "x 2^{-98}"),
    ("3:30 am", "3:30 pm"),
    ("-1,1", "1"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("0", "10^{-9}"),
    ("0", "0.0000001"),
    ("2 million", "2"),
    ("2", "2 thousand"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert equivalent(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equivalent(gold, answer)


def cases():
    file = SHARED / "cases" / "grading" / "math.jsonl"
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


@pytest.mark.skipif(not cases(), reason="../shared/cases does not exist")
def test_shared_cases_are_judged_as_expected():
    judged = {
        (c["gold"], c["response"]): verdict(remove_eos(c["response"]), c["gold"]) for c in cases()
    }
    assert [c for c in cases() if judged[c["gold"], c["response"]] != c["expected"]] == []


def remove_eos(response):
    """Removes the EOS token. In a run, the grader removes all special tokens of the tokenizer; see test_grader.py."""
    return response.removesuffix("<｜end▁of▁sentence｜>")


ANSWERED = [
    ("The answer is 72, which is the total.", "72"),
    ("The answer is 70,000 dollars.", "70000"),
    ("So the answer is **12**.", "12"),
    ("Answer: 12\n\nLet me double-check whether the answer is consistent. Yes.", "12"),
    ("The answer is -3.", "-3"),
    ("The answer is $x=3$.", "3"),
    (r"the answer is \(\frac12\) because of it", "1/2"),
    ("Final answer: 3/4", "3/4"),
    (r"**Final Answer**: $\boxed{5}$", "5"),
    ("#### 12.", "12"),
    ("#### **12**", "12"),
    ("#### __12__", "12"),
    ("#### $12$ dollars", "12"),
    ("#### 70,000", "70000"),
    (r"So \boxed 7", "7"),
    (r"So $\boxed7$.", "7"),
    (r"\boxed{3} and \boxed{4}", "3,4"),
    (r"\boxed{3}, no wait, \boxed{4}", "4"),
    (r"<think>\boxed{3}</think> so \boxed{4}", "4"),
    ("<think>a</think>\nThe answer is 12.5%.", "12.5%"),
    ("The answer is: 5 apples.", "5"),
    ("The correct answer is 17 since 17 is prime", "17"),
    ("Therefore, the final answer is $10$ and we are done.", "10"),
    ("The answer is 1,234.", "1234"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is Evelyn.", "Evelyn"),
    ("The answer is x = 4.", "4"),
    ("The answer would be 9.", "9"),
    ("Answer = 9", "9"),
    ("answer: $2$ or $3$", "2,3"),
    ("The answer is (1, 2).", "(1,2)"),
    (r"The answer is \$5.", "5"),
    ("The answer is $5.", "5"),
    ("The answer is $5 per day", "5"),
    ("The answer is approximately 3.14.", "3.14"),
    ("The answer is just 3.14.", "3.14"),
    ('The answer is "Monday".', "Monday"),
    ('It is so: "The answer is Monday."', "Monday"),
    ("“The answer is 24 m.”", "24 m"),
    ('The answer is "7"', "7"),
    ("The answer is $6.25, not $7.", "6.25"),
    ('The answer is $6.25, and the last line is "$6.25 x 5 = $31.75"', "6.25"),
    ('The answer is 6.\nThe last line is "The answer is."', "6"),
    ("The answer is $5$ or $7$.", "5, 7"),
    ("The answer is therefore $9$.", "9"),
    ("The answer is 2 hours.", "2"),
    (r"\boxed{\text{Yes}}", "yes"),
    (r"The answer is \boxed{12}. So 13 is wrong.", "12"),
    ("\\[\n\\boxed{\n12\n}\n\\]", "12"),
    ("answer is 4\n\nThe answer is clear.", "4"),
    ("I think the answer is 4! Great.", "4"),
    ("The answer is 12 (twelve).", "12"),
]


@pytest.mark.parametrize(("response", "gold"), ANSWERED)
def test_the_answer_is_extracted_from_a_sentence(response, gold):
    assert verdict(response, gold) is Verdict.CORRECT
    assert verdict(response, "987654321") is Verdict.WRONG


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("42", False),
        ("1e-5", False),
        (r"\frac{1}{2}", False),
        ("x + 1", False),
        ("(1, 2)", False),
        ("Evelyn", True),
        (r"\text{no solution}", True),
        ("the red one", True),
        (r"\boxed{Evelyn}", True),
        ("#### Evelyn", True),
        ("1" * (MAX_ANSWER_CHARS + 1), True),
        ("", True),
    ],
)
def test_gold_answers_without_math_are_recognized(gold, expected):
    assert is_text(gold) is expected


@pytest.mark.parametrize(
    "text",
    [
        "answer is " * 100_000,
        "the answer is 5, " * 60_000,
        "answer:\n" * 120_000,
        "\\boxed{" * 200_000,
        "#### " * 200_000,
        "$" * 1_000_000,
        "answer is " + "$x$ and " * 100_000,
    ],
)
def test_an_answer_is_extracted_in_linear_time(text):
    """A quadratic search would take hours, so the timeout in pyproject.toml would end the test."""
    extract_math_answer(text)


def test_a_short_word_is_not_read_as_a_product():
    assert verdict(r"\boxed{no}", "no") is Verdict.CORRECT
    assert verdict(r"\boxed{No}", "no") is Verdict.CORRECT
    assert verdict("The answer is on.", "no") is Verdict.WRONG
    assert verdict(r"\boxed{yx}", "xy") is Verdict.CORRECT


def test_the_lenient_reward_falls_back_to_the_last_number():
    problem = Problem("", (), "42")
    assert grade_math_lenient("I think it is 42", problem)[0] is Verdict.CORRECT
    assert grade_math("I think it is 42", problem)[0] is Verdict.WRONG
    assert grade_math_lenient(r"so \boxed{41}", problem)[0] is Verdict.WRONG
    # math-verify treats numbers below 1e-15 as 0.
    assert grade_math_lenient(r"\boxed{2^{-98}}", Problem("", (), "2^{-99}"))[0] is Verdict.CORRECT


def test_the_lenient_reward_evaluates_an_expression_without_a_result():
    problem = Problem("", (), "77")
    assert grade_math_lenient("I compute 7*11", problem)[0] is Verdict.CORRECT
    assert grade_math("I compute 7*11", problem) == (Verdict.WRONG, None)


def verdict(response, answer):
    return grade_math(response, Problem("", (), answer))[0]


def test_verdicts():
    assert verdict(r"so $x = \boxed{0.5}$", r"\frac12") is Verdict.CORRECT
    assert verdict(r"so $x = \boxed{0.6}$", r"\frac12") is Verdict.WRONG
    assert verdict("no idea", r"\frac12") is Verdict.WRONG
    assert verdict(r"\boxed{}", r"\frac12") is Verdict.WRONG
    assert verdict(r"\boxed{" + "1" * (MAX_ANSWER_CHARS + 1) + "}", "1") is Verdict.WRONG


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("2024-03-05", r"\boxed{2016}", Verdict.WRONG),
        ("2016", r"\boxed{2024-03-05}", Verdict.WRONG),
        ("2024-03-05", "The answer is 5 March 2024.", Verdict.CORRECT),
        ("2024-03-05", "The answer is 2024-3-5.", Verdict.CORRECT),
        ("March 5, 2024", r"\boxed{\text{5th of March 2024}}", Verdict.CORRECT),
        ("Sept. 5 2024", r"\boxed{2024-09-05}", Verdict.CORRECT),
        ("March 5, 2024", r"\boxed{March 6, 2024}", Verdict.WRONG),
        ("2024 - 13 - 5", r"\boxed{2006}", Verdict.CORRECT),  # not a date
    ],
)
def test_dates_are_compared_as_dates(gold, answer, expected):
    assert verdict(answer, gold) is expected


@pytest.mark.parametrize("empty", [r"\boxed{}", r"\boxed{ }", r"$\boxed{$ $}$", r"\fbox{}"])
def test_an_empty_box_is_not_an_answer(empty):
    response = f"The answer is 60. I put my final answer within {empty}."
    assert verdict(response, "60") is Verdict.CORRECT
    assert verdict(rf"\boxed{{60}} {empty}", "60") is Verdict.CORRECT
    assert grade_math(f"Hm. {empty}", Problem("", (), "60"))[1] is None


def test_answers_that_only_identical_text_matches_are_recognized():
    for text in ("Tuesday", "It is 300, because of the factor.", "no", ""):
        assert is_text(text), text
    for text in ("5", "x = 5", "12 km", "3 square meters per second", "March 5, 2024", r"\frac12"):
        assert not is_text(text), text


@pytest.mark.parametrize("answer", ["", " ", "$", r"\boxed{}"])
def test_a_problem_without_an_answer_raises_an_error(answer):
    with pytest.raises(ValueError, match="empty"):
        verdict(r"\boxed{1}", answer)


def math_500_golds():
    parquet = pytest.importorskip("pyarrow.parquet")
    for path in MATH_500:
        try:
            rows = parquet.read_table(path).to_pylist()
        except FileNotFoundError:
            continue
        return [row["reward_model"]["ground_truth"] for row in rows]
    pytest.skip("valid.math.parquet (MATH-500 in the verl schema) is not in ../shared/data")


@pytest.mark.slow
def test_answers_of_math_500_equal_themselves_but_not_each_other():
    golds = math_500_golds()
    assert len(golds) == 500
    pairs = [(golds[i], golds[i]) for i in range(500)] + [
        (golds[i], golds[i - 1]) for i in range(500)
    ]
    with GraderPool(grade_math, num_workers=2, timeout_secs=30.0) as pool:
        futures = [
            pool.submit(rf"Thus $x = \boxed{{{answer}}}$.", Problem("", (), gold))
            for gold, answer in pairs
        ]
        verdicts = [future.result().verdict for future in futures]
    assert [g for g, v in zip(golds, verdicts, strict=False) if v is not Verdict.CORRECT] == []
    correct_by_chance = {
        (gold, answer)
        for (gold, answer), v in zip(pairs[500:], verdicts[500:], strict=True)
        if v is Verdict.CORRECT
    }
    assert correct_by_chance == {("x=5", "5"), ("7", "7"), ("3", "3")}
    assert {Verdict.CORRECT, Verdict.WRONG} == set(verdicts)  # no errors


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"The answer is within \boxed{}", None),
        (r"The answer is indeed within $\boxed{ }$.", None),
        (r"The answer is 7. The final answer is in \boxed{}.", "7"),
        (r"The answer is 5. Put it in \boxed{}", "5"),
    ],
)
def test_a_repeated_request_for_a_box_is_not_an_answer(response, answer):
    assert extract_math_answer(response) == answer
