r"""Grades multiple-choice answers by the letter that a response chooses (ARC-c: A-D, MMLU-Pro: A-J).

Extraction is strict: a response that states two letters, or no letter in a recognized position, has no answer.
"""

import re

from trapo_jax.rewards.extraction import final_part, last_boxed
from trapo_jax.types import Problem, Verdict

LETTERS = "A-Ja-j"
# A letter, alone or before the text of its choice: B, (B), b), B. 12 cm, B - Paris, Option B; but not AB, "A, B",
# "A or B" or "a good one".
LETTER = re.compile(
    rf"(?:(?i:option|choice|answer)\s{{1,3}})?(?:\(([{LETTERS}])\)[.:]?(?:\s.*)?|([{LETTERS}])(?:[.:)](?:\s.*)?|\s[-–—]\s.*)?)",
    re.DOTALL,
)
WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|boldsymbol)\s?\{([^{}]*)\}"
)
SPACING = re.compile(r"\\[ ,;:!]|\\q?quad\b|~")
# "answer is (B)", "Answer: B", "**Answer:** B", "correct option is B". Repetitions are bounded to keep
# the running time linear.
STATEMENT = re.compile(
    r"(?i:answer|option|choice)(?:\*\*|__)?\s{0,3}(?::|=|(?i:is|would be)\b)\s{0,3}:?(?:\*\*|__)?\s{0,3}"
    rf"(?:(?i:option|choice)\s)?(?:\*\*|__|\$)?(?:\(([{LETTERS}])\)|([{LETTERS}])(?![\w'-]))(?=(?P<rest>[^\n]{{0,80}}))"
)
# Text that may follow a letter without parentheses. Otherwise, "A" may be an article ("the answer is A good one").
AFTER_LETTER = re.compile(r"\s{0,3}(?:$|[.,:;)*_$\]}]|[-–—]\s|because\b|since\b|as\b)")
SECOND_LETTER = re.compile(rf"\W{{0,6}}(?:(?:and|or|,|/|&)\W{{0,6}})\(?[{LETTERS}](?![\w'-])")


def grade_multiple_choice(response: str, problem: Problem) -> tuple[Verdict, str | None]:
    """Compares the letter that a response chooses with the problem's answer.

    Returns:
      The verdict (WRONG if no letter is chosen) and the chosen letter (None if there is none).

    Raises:
      ValueError: if the problem's answer is not a single letter A-J.
    """
    gold = _single_letter(problem.answer)
    if gold is None:
        raise ValueError("the problem's answer is not a letter A-J")
    choice = extract_choice(response)
    return Verdict.CORRECT if choice == gold else Verdict.WRONG, choice


def extract_choice(response: str) -> str | None:
    r"""Extracts the letter that a response chooses.

    The letter is taken from the last `\boxed{}`; otherwise, from the last statement such as "the answer is (B)";
    otherwise, from a response that consists only of a letter. Returns None if there is not exactly one letter.

    >>> extract_choice(r"Hence \boxed{\textbf{(C)}\ 12}.")
    'C'
    >>> extract_choice("Not A. The answer is (b).")
    'B'
    >>> extract_choice("The answer is A or B.") is None
    True
    """
    text = WRAPPER.sub(r"\1", final_part(response)).strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return _single_letter(boxed)
    statement = None
    for statement in STATEMENT.finditer(text):  # noqa: B007 - the last one
        pass
    if statement is None:
        return _single_letter(text)
    is_bare = statement[2] is not None
    if SECOND_LETTER.match(statement["rest"]):
        return None
    if is_bare and not AFTER_LETTER.match(statement["rest"]):
        return None
    return (statement[1] or statement[2]).upper()


def _single_letter(text: str) -> str | None:
    text = SPACING.sub(" ", WRAPPER.sub(r"\1", text)).strip(" $*_\n")
    match = LETTER.fullmatch(text)
    return (match[1] or match[2]).upper() if match else None
