r"""Multiple choice: the letter that a response settles on (ARC-c: A-D, MMLU-Pro: A-J).

Strict: a response that names two letters, or none in a recognised place, has no answer.
"""

import re

from trapo_jax.rewards.extraction import last_boxed, without_special_tokens
from trapo_jax.types import Problem, Verdict

LETTERS = "A-J"
# \boxed{B}, \boxed{(B)}, \boxed{\text{B}}, \boxed{B. 12 cm}; not \boxed{AB}, \boxed{A, B}, \boxed{A or B}.
LETTER = re.compile(rf"\(?([{LETTERS}])\)?[.:]?(?:(?<=[.:)])\s.*)?", re.DOTALL)
WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")
# "answer is (B)", "Answer: B", "**Answer:** B", "correct option is B". Bounded repetitions: linear time.
STATEMENT = re.compile(
    r"(?i:answer|option|choice)(?:\*\*)?\s{0,3}(?::|=|(?i:is)\b)\s{0,3}:?(?:\*\*)?\s{0,3}"
    rf"(?:(?i:option|choice)\s)?(?:\*\*|\$)?(?:\(([{LETTERS}])\)|([{LETTERS}])(?![\w'-]))(?=(?P<rest>[^\n]{{0,80}}))"
)
# What may follow a letter without parentheses: else "A" is an article ("the answer is A good one").
AFTER_LETTER = re.compile(r"\s{0,3}(?:$|[.,:;)*$\]}]|because\b|since\b|as\b)")
SECOND_LETTER = re.compile(rf"\W{{0,6}}(?:(?:and|or|,|/|&)\W{{0,6}})\(?[{LETTERS}](?![\w'-])")


def grade_multiple_choice(response_text: str, problem: Problem) -> Verdict:
    """Whether the response settles on the problem's letter; WRONG too if it settles on none.

    Raises:
      ValueError: if the problem's answer is not one letter A-J.
    """
    gold = LETTER.fullmatch(problem.answer.strip())
    if gold is None:
        raise ValueError("the problem's answer is not a letter A-J")
    right = extract_choice(response_text) == gold[1]
    return Verdict.CORRECT if right else Verdict.WRONG


def extract_choice(response_text: str) -> str | None:
    r"""The letter in the last `\boxed{}`; without a box, the letter of the last statement such as
    "the answer is (B)"; without one, a response that is but a letter. None if that is not one letter.

    >>> extract_choice(r"Hence \boxed{\text{(C)}}.")
    'C'
    >>> extract_choice("Not A. The answer is (B).<|im_end|>")
    'B'
    >>> extract_choice("The answer is A or B.") is None
    True
    """
    text = without_special_tokens(response_text).strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return _single_letter(WRAPPER.sub(r"\1", boxed).strip(" $*"))
    statement = None
    for statement in STATEMENT.finditer(text):  # noqa: B007 - the last one
        pass
    if statement is None:
        return _single_letter(text)
    bare = statement[2] is not None
    if SECOND_LETTER.match(statement["rest"]) or (
        bare and not AFTER_LETTER.match(statement["rest"])
    ):
        return None
    return statement[1] or statement[2]


def _single_letter(text: str) -> str | None:
    match = LETTER.fullmatch(text)
    return match[1] if match else None
