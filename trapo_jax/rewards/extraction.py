"""Where a response says its answer: the parts that mathematics and multiple choice share.

Every function takes time linear in the text, whatever the text.
"""

import re

# Special tokens as tokenizers spell them: <|im_end|>, </s>, <end_of_turn>, ...
SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn)>")
# A doubled backslash before `boxed` is a slip, not a line break; escaped braces open and close nothing.
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?!\\boxed)[{}\\]|[{}]")


def without_special_tokens(text: str) -> str:
    """The text with every special token replaced by a space.

    >>> without_special_tokens("#### 42<|im_end|>")
    '#### 42 '
    """
    return SPECIAL_TOKEN.sub(" ", text)


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last `\boxed{}` that is closed; None if there is none.

    A box within a box belongs to the outer one. One that is never closed does not count.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}, so \boxed{")
    '\\frac{1}{2}'
    """
    opened: list[int] = []  # where the content of each open brace begins; -1 if it opens no box
    last: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text):
        if len(match[0]) > 2:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(-1)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start >= 0:
                last = (start, match.start())
    return None if last is None else text[slice(*last)]
