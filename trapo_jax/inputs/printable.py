"""Makes text safe to print: completions and messages may contain terminal control sequences."""


def printable(text: str, *, keep: str = "") -> str:
    """Replaces unprintable characters with Python escapes.

    Args:
      text: any text.
      keep: characters to leave unescaped.

    >>> printable("\\x1b[31mred\\nstep 9: accuracy 1.000")
    '\\\\x1b[31mred\\\\nstep 9: accuracy 1.000'
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def first_line(text: str, max_chars: int) -> str:
    """Returns the first nonblank line of a string, with unprintable characters escaped, truncated to `max_chars`.

    >>> first_line("\\n no such file\\tor folder \\n", 20)
    'no such file\\\\tor fol'
    """
    line = text.strip().partition("\n")[0].rstrip()
    return printable(line[:max_chars])[:max_chars]


def _escaped(character: str) -> str:
    """Returns the Python escape sequence of a character, which may be a lone surrogate."""
    return character.encode("unicode_escape").decode()
