r"""Extracts final answers from responses, for the math and multiple-choice graders.

Every function takes time linear in the length of the text, even for hostile text.
"""

import re

# A doubled backslash before `boxed` is a typo rather than a line break. Escaped braces do not open or close groups.
BOX = re.compile(r"\\(?:boxed|fbox|framebox)")
EMPTY_BOX = re.compile(rf"{BOX.pattern}\s*\{{[\s$]*\}}")
_BOX_OR_BRACE = re.compile(rf"{BOX.pattern}\s*\{{|\\(?!\\boxed)[{{}}\\]|[{{}}]")
# In `\boxed 42`, TeX would box only the first token, but the writer means the whole number or name.
_BARE_BOX = re.compile(
    r"\\boxed\s{0,3}([+-]?\d[\d.,/]*|(?<=\s)[A-Za-z]\w*|\\[dt]?frac\s?\{[^{}]*\}\{[^{}]*\})"
)
# Text that may separate two boxes that together form one answer.
_BETWEEN_BOXES = re.compile(
    r"[\s$,;.]*(?:\\(?:text|quad|qquad)\s?\{?)?[\s,]*(?:and|or)?[\s,}$]*(?:\\[()\[\]]|[\s$])*"
)

# A special token at the end of a string, such as <|im_end|> or <｜end▁of▁sentence｜>.
_SPECIAL_TOKEN = re.compile(r"<([|｜])[^<>|｜\s]{1,50}\1>\s{0,10}\Z")
MAX_SPECIAL_TOKENS, MAX_SPECIAL_TOKEN_CHARS = 4, 64


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{}`; None if there is none.

    A nested box is part of the outer one. Boxes that are empty or never closed are ignored. Boxes separated only by a
    comma, "and" or "or" form one answer.

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
    """Finds all outermost boxes that are closed and not empty.

    Returns:
      The start of the command, and the start and the end of the content, of each box.
    """
    # (start of the command, start of its content) of each open box; (-1, -1) for other braces.
    opened: list[tuple[int, int]] = []
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
                if text[start : match.start()].strip(" $"):  # An empty box only repeats the prompt.
                    boxes.append((begin, start, match.start()))
    return boxes


def final_part(text: str) -> str:
    """Returns the part of a response that may contain its answer.

    Thoughts and final special tokens are removed. If a finished thought is followed by nothing, the thought is kept.

    A `Grader` knows its tokenizer's special tokens and removes all of them. This function removes them only at the end,
    for text from other sources.

    >>> final_part("<think>Is it 4? No.</think> It is 5.")
    ' It is 5.'
    >>> final_part("<think>Is it 4?")
    ''
    >>> final_part("It is 5.<|im_end|>")
    'It is 5.'
    """
    for _ in range(MAX_SPECIAL_TOKENS):
        if not (match := _SPECIAL_TOKEN.search(text, max(0, len(text) - MAX_SPECIAL_TOKEN_CHARS))):
            break
        text = text[: match.start()]
    finished, closing, after = text.rpartition("</think>")
    begin, opening, _ = (after if closing else text).partition("<think>")
    if opening:
        return begin
    return after if closing and after.strip() else finished if closing else text
