r"""Splits LaTeX at separators outside of brackets, and parses collections such as (1, 2), [0, 1), and \{1, 2\}."""

import re

from trapo_jax.rewards.expressions import NUMERAL

CLOSING = {
    "(": (")", "]"),
    "[": ("]", ")"),
    r"\{": (r"\}",),
    r"\langle": (r"\rangle",),
    "<": (">",),
}
COMMA = re.compile(r"[,;]")
SEPARATOR = re.compile(r",?\s(?:and|or)\s|\\(?:lor|vee|cup)(?![a-zA-Z])|[,;]")
_BRACKET = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]{}]")
_OPENING = ("(", "[", "{", r"\{", r"\langle")


def inside(text: str, opening: str) -> str | None:
    """Returns the content of a pair of brackets that encloses the whole text; None if there is no such pair."""
    if not text.startswith(opening):
        return None
    if opening == "<":
        return text[1:-1] if len(text) > 1 and text.endswith(">") else None
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match[0] in _OPENING else -1
        if depth == 0:
            return text[len(opening) : match.start()] if match.end() == len(text) else None
    return None


def split(text: str, separator: re.Pattern) -> list[str]:
    """Splits a string at each match of a separator outside of all brackets, and strips the parts."""
    changes, depth = [], 0  # (position, depth before it) of every change in depth
    for match in _BRACKET.finditer(text):
        changes.append((match.start(), depth))
        depth = max(depth + (1 if match[0] in _OPENING else -1), 0)
    changes.append((len(text), depth))
    parts, last, index = [], 0, 0
    for match in separator.finditer(text):
        while changes[index][0] < match.start():
            index += 1
        if changes[index][1] == 0:
            parts.append(text[last : match.start()])
            last = match.end()
    return [part.strip() for part in (*parts, text[last:])]


def split_list(text: str, separator: re.Pattern = COMMA) -> list[str]:
    """Splits a string at commas and semicolons, or at another separator, and drops empty parts."""
    return [part for part in split(text, separator) if part]


def collection(text: str) -> tuple[str, list[str]]:
    r"""Returns the brackets around a collection and its elements.

    Returns:
      The brackets, such as "(]" or `\{\}`, or "" if there are none; and the elements. Text that is not a collection is
      returned as the only element. `1,000` has one element, and `a \pm b` has two.
    """
    for opening, closings in CLOSING.items():
        for closing in closings:
            inner = inside(text, opening) if text.endswith(closing) else None
            if inner is not None and (opening == r"\{" or len(split_list(inner)) > 1):
                return opening + closing, split_list(inner)
    if NUMERAL.fullmatch(text):
        return "", [text]
    return "", [sign for part in split_list(text, SEPARATOR) for sign in _both_signs(part)]


def _both_signs(text: str) -> list[str]:
    if text.count(r"\pm") != 1 or r"\mp" in text:
        return [text]
    return [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]


def is_ordered(brackets: str) -> bool:
    """Returns whether the order of the elements in these brackets matters."""
    return brackets != "" and not brackets.startswith(r"\{")


def form(brackets: str, length: int) -> str:
    """Returns the form of a collection, the same for equal collections: "set", "tuple", or an interval's brackets."""
    if brackets.startswith(r"\{"):
        return "set"
    return brackets if brackets in ("(]", "[)") or (brackets == "[]" and length == 2) else "tuple"
