r"""Finds the final answer in a response: the parts that mathematics and multiple choice share.

Every function takes time linear in the text, whatever the text.
"""

import re

# A doubled backslash before `boxed` is a slip, not a line break; escaped braces open and close nothing.
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\(?!\\boxed)[{}\\]|[{}]")
# `\boxed 7`: TeX would frame one token, but writers mean the number or name.
_BARE_BOX = re.compile(
    r"\\boxed\s{0,3}([+-]?\d[\d.,/]*|(?<=\s)[A-Za-z]\w*|\\[dt]?frac\s?\{[^{}]*\}\{[^{}]*\})"
)
# What may stand between two boxes that give one answer together.
_BETWEEN_BOXES = re.compile(
    r"[\s$,;.]*(?:\\(?:text|quad|qquad)\s?\{?)?[\s,]*(?:and|or)?[\s,}$]*(?:\\[()\[\]]|[\s$])*"
)


def last_boxed(text: str) -> str | None:
    r"""Returns what stands inside the last `\boxed{}`; None if there is none.

    A box within a box belongs to the outer one. A box that is never closed does not count. Boxes that only a comma,
    "and" or "or" separates give one answer together.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}, so \boxed{")
    '\\frac{1}{2}'
    >>> last_boxed(r"$x = \boxed{1}$ or $\boxed{2}$")
    '1, 2'
    """
    boxes = _boxes(text)
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return bare[-1].rstrip(".,") if bare else None
    (_, start, end), *others = reversed(boxes)
    contents, begin = [text[start:end]], boxes[-1][0]
    for box, start, end in others:
        if begin - end > 40 or not _BETWEEN_BOXES.fullmatch(text[end + 1 : begin]):
            break
        if text[start:end] not in contents:
            contents.insert(0, text[start:end])
        begin = box
    return ", ".join(contents)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Returns for each closed box that is in no other one where it begins and where its content begins and ends."""
    opened: list[
        tuple[int, int]
    ] = []  # begin of the command and of the content; -1 for other braces
    boxes: list[tuple[int, int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if len(match[0]) > 2:
            opened.append((match.start(), match.end()))
        elif match[0] == "{":
            opened.append((-1, -1))
        elif match[0] == "}" and opened:
            begin, start = opened.pop()
            if start >= 0:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()
                boxes.append((begin, start, match.start()))
    return boxes


def final_part(text: str) -> str:
    """Returns the part of a response that may hold its answer: nothing of a thought that is not finished.

    >>> final_part("<think>Is it 4? No.</think> It is 5.")
    ' It is 5.'
    >>> final_part("<think>Is it 4?")
    ''
    """
    finished, closing, after = text.rpartition("</think>")
    begin, opening, _ = (after if closing else text).partition("<think>")
    if opening:
        return begin
    return after if closing and after.strip() else finished if closing else text
