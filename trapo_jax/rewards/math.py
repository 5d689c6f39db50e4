r"""Grades mathematical answers.

`grade_math` is strict: a response must state its answer in a box, after `####`, or after "the answer is", and the
answer must be equivalent to the problem's answer according to `equality.equivalent`. `grade_math_lenient` is the reward
used by the TRAPO authors: math-verify with its default settings, which falls back to the last number in the response.

Both must run in processes that can be killed: on hostile answers, sympy may run forever while holding the GIL, and even
printing a parsed answer may hang. math-verify's own time limits are disabled because they rely on signals, which do not
work in threads and do not interrupt C code. The grader pool's time limit applies instead.
"""

import functools
import logging
import re
from typing import Any

from trapo_jax.rewards.dates import read_date
from trapo_jax.rewards.equality import equivalent as _equivalent
from trapo_jax.rewards.equality import is_prose
from trapo_jax.rewards.extraction import BOX, EMPTY_BOX, final_part, last_boxed
from trapo_jax.rewards.notation import EMPHASIS, read_answer
from trapo_jax.types import Problem, Verdict

# The answer formats of `extract_math_answer` in order of precedence, as examples for messages.
ANSWER_FORMS: dict[str, str] = {
    "box": "the answer in \\boxed{}",
    "mark": "'#### ANSWER' in a line of its own",
    "phrase": "'The answer is ANSWER'",
}
MAX_ANSWER_CHARS = 2_000
MIN_SENTENCE_WORDS = 4
# Repetitions in the patterns are bounded to keep the running time linear in the length of the text.
ANSWER_MARK = re.compile("####")
ANSWER_LINE = re.compile(rf"^[ \t]{{0,8}}{ANSWER_MARK.pattern}[ \t]{{0,8}}(\S.*)$", re.MULTILINE)
ANSWER_PHRASE = re.compile(
    r"\banswer(?:\s{1,3}(?:is|would be|will be|equals|=)\s{0,3}:?|\s{0,3}(?:\*\*|__)?\s{0,3}[:=])\s{0,3}(?:\*\*|__)?\s{0,3}[\"“]?(?=\S)",
    re.IGNORECASE,
)
# "The answer is within \boxed{}" repeats the request for a box instead of stating an answer.
PLACEHOLDER = re.compile(rf"(?:[A-Za-z]{{1,20}} ){{0,5}}\$?{EMPTY_BOX.pattern}")
DELIMITED = re.compile(
    # As in Pandoc, a $ before a digit does not close a formula: in "$6, not $7", both are currency signs.
    r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_NOT_AN_ANSWER = " \t.,;:!?\"'“”" + EMPHASIS  # characters that alone are not an answer
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
BETWEEN = re.compile(r"\s{0,2}(?:,|and|or|,\s?and|,\s?or)\s{0,2}(?=[$\\])")
# Matches the start of a mathematical answer, in contrast to an answer in words.
MATHEMATICAL = re.compile(r"[\d$\\(\[{|+.√π∞€£-]|[−±≈~=]|[A-Za-z](?:\s?[=^_(]|[.,]?$)")
CLAUSE_END = re.compile(
    r"[.!?](?=[\"”]?(?:\s|$))|\s\((?=[A-Za-z]{2})|[,;]?\s\(?(?:which|because|since|so|as|where|when|after|hence|thus|therefore|if|i\.e\.|that|but|not|for|at|in|on)\b|;|,\s(?:and|giving|meaning)\s"
)


def grade_math(response: str, problem: Problem) -> tuple[Verdict, str | None]:
    r"""Compares a response's answer with the problem's answer.

    Args:
      response: any text without special tokens.
      problem: the problem; its `answer` is LaTeX or plain text, with or without `$`, `\boxed{}`, or `#### `.

    Returns:
      The verdict and the extracted answer. The verdict is also WRONG if the response has no answer, or if its answer
      cannot be parsed or has more than MAX_ANSWER_CHARS characters.

    Raises:
      ValueError: if the problem's answer is empty.
    """
    gold = gold_answer(problem.answer)
    answer = extract_math_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Verdict.WRONG, answer
    try:
        return Verdict.CORRECT if _equivalent(gold, answer) else Verdict.WRONG, answer
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # sympy cannot compare the answers. Identical answers are recognized before sympy is called.
        return Verdict.WRONG, answer


def grade_math_lenient(response: str, problem: Problem) -> tuple[Verdict, str | None]:
    """Computes the reward of the TRAPO and LUFFY releases: math-verify's defaults on the whole response.

    math-verify falls back to the last number in the response and accepts some wrong answers; see `expressions`. For
    plain expressions, it calls sympy's parser, which evaluates Python code, so this function must run only in a worker
    process.
    """
    library = _math_verify()
    gold = library.parse(f"${problem.answer}$", parsing_timeout=None)
    parsed = library.parse(response, parsing_timeout=None)
    is_correct = library.verify(gold, parsed, timeout_seconds=None)
    answer = next((part for part in parsed if isinstance(part, str)), None)
    return Verdict.CORRECT if is_correct else Verdict.WRONG, answer


def equivalent(gold: str, answer: str) -> bool:
    """Returns whether two answers, as written in datasets and by models, are equivalent.

    Raises:
      ValueError: if `gold` is empty.
    """
    return _equivalent(gold_answer(gold), answer)


@functools.lru_cache(maxsize=1024)  # shared by the rollouts of a group
def gold_answer(text: str) -> str:
    """Returns a problem's answer without a box, `####`, or delimiters.

    Raises:
      ValueError: if the answer is empty.
    """
    boxed, lines = last_boxed(text), ANSWER_LINE.findall(text)
    answer = boxed if boxed is not None else _without_delimiters(lines[-1] if lines else text)
    if not EMPTY_BOX.sub("", answer).strip(" $.\n\t"):
        raise ValueError("the problem's answer is empty")
    return answer


def is_text(answer: str) -> bool:
    """Returns whether a problem's answer is text, so that only the same text matches it. Takes linear time.

    Answers that are empty or longer than MAX_ANSWER_CHARS also count as text, because no other response matches them.
    """
    try:
        gold = gold_answer(answer)
    except ValueError:
        return True
    if len(gold) > MAX_ANSWER_CHARS or is_sentence(gold):
        return True
    return read_date(gold) is None and is_prose(read_answer(gold).text)


def is_sentence(answer: str) -> bool:
    r"""Returns whether an answer has so many words that hardly any response repeats it verbatim. Takes linear time.

    >>> is_sentence("It is 300, because 5 km are 5000 m.")
    True
    >>> is_sentence("3 square meters per second"), is_sentence(r"\frac{\pi}{2}")
    (False, False)
    """
    num_words = len(WORD.findall(answer))
    return num_words >= MIN_SENTENCE_WORDS and not read_answer(answer[:MAX_ANSWER_CHARS]).unit


def extract_math_answer(response: str) -> str | None:
    r"""Extracts the final answer of a response verbatim, in linear time; returns None if there is no answer.

    The answer is the content of the last closed `\boxed{}`; otherwise, the last line `#### answer`; otherwise, the text
    after the last "answer is" or "answer:". Unfinished thoughts are ignored.

    >>> extract_math_answer(r"Thus $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_math_answer("so 42.\n#### **42**")
    '42'
    >>> extract_math_answer("The answer is $7$, which is prime.")
    '7'
    """
    text = final_part(response)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if lines := ANSWER_LINE.findall(text):
        return _without_delimiters(lines[-1].strip(EMPHASIS + " "))
    rests = [
        text[match.end() : match.end() + MAX_ANSWER_CHARS + 1].split("\n", 1)[0]
        for match in ANSWER_PHRASE.finditer(text)
    ]
    rests = [rest for rest in rests if rest.strip(_NOT_AN_ANSWER) and not PLACEHOLDER.match(rest)]
    if not rests:
        return None
    # Prefer a mathematical answer to a later phrase such as "the answer is consistent".
    answer = _of_clause(
        next((rest for rest in reversed(rests) if MATHEMATICAL.match(rest)), rests[-1])
    )
    return answer if answer.strip(_NOT_AN_ANSWER) else None


def answer_forms(text: str) -> set[str]:
    r"""Returns the answer formats of `extract_math_answer` that a text mentions. Takes linear time.

    >>> sorted(answer_forms(r"The answer is \boxed{5}."))
    ['box', 'phrase']
    """
    patterns = {"box": BOX, "mark": ANSWER_MARK, "phrase": ANSWER_PHRASE}
    return {form for form, pattern in patterns.items() if pattern.search(text)}


def answer_form(text: str) -> str | None:
    r"""Returns the first of `ANSWER_FORMS` that a text mentions; None if it mentions none.

    >>> answer_form(r"Put it within \boxed{}."), answer_form("End with 'Answer: N'."), answer_form("2 + 2?")
    ('box', 'phrase', None)
    """
    found = answer_forms(text)
    return next((form for form in ANSWER_FORMS if form in found), None)


def _of_clause(rest: str) -> str:
    """Returns the answer at the start of a clause."""
    if delimited := _delimited(rest):
        return ", ".join(delimited)
    end = CLAUSE_END.search(rest)
    return rest[: end.start() if end else None].rstrip(' .,"”').strip(" " + EMPHASIS)


def warm_up() -> None:
    """Imports sympy and builds math-verify's grammar, which takes several seconds."""
    equivalent("x + 1", "x + 2")


@functools.cache
def _math_verify() -> Any:
    """Imports math-verify lazily, because the import takes seconds, and suppresses warnings about disabled timeouts."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _without_delimiters(text: str) -> str:
    """Converts `$x$` to `x`. Any other string, such as `$x$ and $y$`, is returned unchanged."""
    text = text.strip()
    match = DELIMITED.fullmatch(text)
    inner = next((group for group in match.groups() if group), "") if match else ""
    return inner.strip() if inner and "$" not in inner else text


def _delimited(text: str) -> list[str]:
    """Returns the formulas at the start of a string: one, or several separated by commas, "and", or "or"."""
    formulas, position = [], 0
    while match := DELIMITED.match(text, position):
        formulas += [group.strip() for group in match.groups() if group]
        between = BETWEEN.match(text, match.end())
        position = between.end() if between else len(text)
    return formulas
