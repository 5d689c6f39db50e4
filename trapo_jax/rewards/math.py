r"""Mathematical answers, compared by math-verify (https://github.com/huggingface/Math-Verify).

Only for processes that can be killed: on a hostile answer math-verify and sympy compute for ever, holding the
GIL, and even printing what they parsed may hang. Its own time limits are switched off (they are signals, which do
not work in threads and do not interrupt C code); the pool's limit bounds it.

Only its LaTeX grammar is used: its reader of plain expressions is sympy's `parse_expr`, which is `eval`.

Stricter than `math_verify.parse` on the whole response, which falls back to the last number it sees: a response
that does not say what its answer is has none.
"""

import functools
import logging
import re
from typing import Any

from trapo_jax.rewards.extraction import last_boxed, without_special_tokens
from trapo_jax.types import Problem, Verdict

MAX_ANSWER_CHARS = 2_000
# Bounded repetitions: time stays linear in the text.
ANSWER_LINE = re.compile(r"^[ \t]{0,8}####[ \t]{0,8}(\S.*)$", re.MULTILINE)
ANSWER_PHRASE = re.compile(
    r"\banswer(?:\s{1,3}is\s{0,3}:?|\s{0,3}(?:\*\*)?\s{0,3}[:=])\s{0,3}(?:\*\*)?\s{0,3}(?=\S)",
    re.IGNORECASE,
)
DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def grade_math(response_text: str, problem: Problem) -> Verdict:
    """Whether the response's answer equals the problem's.

    Args:
      response_text: any text; special tokens in it do not matter.
      problem: its `answer` is LaTeX or plain, with or without `$`, `\\boxed{}` or `#### `.

    Returns:
      WRONG also if the response has no answer, one that cannot be read, or one of more than
      MAX_ANSWER_CHARS characters.

    Raises:
      ValueError: if the problem's answer has nothing to compare with.
      Exception: whatever sympy raises while it compares; the pool makes that ERROR.
    """
    answer = extract_math_answer(response_text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Verdict.WRONG
    return Verdict.CORRECT if equivalent(problem.answer, answer) else Verdict.WRONG


def extract_math_answer(response_text: str) -> str | None:
    r"""The final answer as it is written, in time linear in the text; None if there is none.

    The last closed `\boxed{}`; without one the last line `#### answer`; without one what follows the
    last "answer is" or "answer:" on its line.

    >>> extract_math_answer(r"Thus $x = \boxed{\frac{1}{2}}$.<|im_end|>")
    '\\frac{1}{2}'
    >>> extract_math_answer("so 42.\n#### 42</s>")
    '42'
    >>> extract_math_answer("The answer is $7$.")
    '7'
    """
    text = without_special_tokens(response_text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if lines := ANSWER_LINE.findall(text):
        return _without_delimiters(lines[-1])
    ends = [match.end() for match in ANSWER_PHRASE.finditer(text)]
    if ends:
        rest = text[ends[-1] :].split("\n", 1)[0]
        return _first_delimited(rest) or rest.split(". ", 1)[0].strip(" .*")
    return None


def equivalent(gold: str, answer: str) -> bool:
    """Whether `answer` means what `gold` means; the order matters to math-verify.

    Raises:
      ValueError: if nothing can be read from `gold`.
    """
    golds, answers = _parse_gold(gold), _parse(answer)
    if _texts(golds) & _texts(answers):
        return True  # nothing to compute
    return _math_verify().verify(golds, answers, timeout_seconds=None, raise_on_error=True)


@functools.lru_cache(maxsize=1024)  # a group's rollouts share it
def _parse_gold(gold: str) -> list[Any]:
    boxed, lines = last_boxed(gold), ANSWER_LINE.findall(gold)
    text = boxed if boxed is not None else _without_delimiters(lines[-1] if lines else gold)
    if not (parsed := _parse(text)):
        raise ValueError("the problem's answer is empty or cannot be read")
    return parsed


def _parse(answer: str) -> list[Any]:
    """The sympy expression, if it is one, and the normalised text."""
    config = [_math_verify().LatexExtractionConfig()]
    return _math_verify().parse(
        f"\\boxed{{{answer}}}", config, parsing_timeout=None, raise_on_error=True
    )


def warm_up() -> None:
    """Imports sympy and builds math-verify's grammar, which takes seconds."""
    equivalent("1", "2")


@functools.cache
def _math_verify() -> Any:
    """The library, imported where it is used (seconds); without its warnings that no time limit is set."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _texts(parsed: list[Any]) -> set[str]:
    return {part for part in parsed if isinstance(part, str)}


def _without_delimiters(text: str) -> str:
    """`$x$` to `x`; anything else, such as `$x$ and $y$`, as it is."""
    text = text.strip()
    match = DELIMITED.fullmatch(text)
    inner = next((group for group in match.groups() if group), "") if match else ""
    return inner.strip() if inner and "$" not in inner else text


def _first_delimited(text: str) -> str | None:
    match = DELIMITED.match(text)
    return next(group for group in match.groups() if group).strip() if match else None
