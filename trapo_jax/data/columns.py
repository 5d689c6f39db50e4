"""Maps rows to examples. The columns are defined in `layouts`."""

import dataclasses
import decimal
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from trapo_jax.data.examples import DataReport, Example, Prompt
from trapo_jax.data.layouts import (
    MAX_ROW_CHARS,
    Columns,
    Presence,
    WrongValue,
    look_up,
    messages_in,
    parsed,
    reading,
    shown_path,
    wrong_type,
)
from trapo_jax.data.sources import Row
from trapo_jax.inputs.files import shown
from trapo_jax.types import ExpertPart, UserError

_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_NO_ANSWER = "with an empty answer"
_TOO_LONG = f"with more than {MAX_ROW_CHARS:,} characters"
_ALTERNATIVES = (
    "with a list of solutions (each entry is one alternative expert solution, not a step)"
)


class _UnusableRow(Exception):
    """Raised with the reason for dropping a row; caught and counted."""


def examples_from_rows(
    rows: Iterable[Row],
    columns: Columns,
    *,
    default_source: str = "",
    expert_part: ExpertPart = "thought",
    needs_answer: bool = True,
) -> tuple[list[Example], DataReport]:
    """Maps rows to examples.

    Rows are dropped and counted if their prompt is empty, null or absent, if their text is not valid Unicode or is
    longer than `MAX_ROW_CHARS`, if their answer lacks the answer marker or is not finite, or, if answers are needed, if
    they have no answer.

    Args:
      rows: rows from `read_rows`.
      columns: a preset or custom columns.
      default_source: the source of rows that do not name one.
      expert_part: which part of a solution's text to train on; see `expert_text`.
      needs_answer: whether to drop rows without an answer; otherwise, their answer is empty.

    Returns:
      The examples in the order of the rows, and a report of what was dropped.

    Raises:
      UserError: if a value has the wrong type, if no row of a file has one of the columns, or if no row is usable. The
        message says where the mistake is or, in the last case, contains the counts.
    """
    if not needs_answer and not columns.answer.endswith("?"):
        columns = dataclasses.replace(columns, answer=columns.answer + "?")
    examples: list[Example] = []
    dropped = Counter[str]()
    presence = Presence(columns)
    num_read = num_with_list = 0
    for row in rows:
        num_read += 1
        try:
            presence.observe(row)
            examples.append(_example(row, columns, default_source, expert_part, needs_answer))
        except _UnusableRow as reason:
            dropped[str(reason)] += 1
        except WrongValue as error:
            raise error.explained(row, columns) from error
        else:
            num_with_list += _has_alternatives(row, columns)
    presence.check()
    num_without = sum(not example.solutions for example in examples)
    notes = Counter({"without an expert solution": num_without, _ALTERNATIVES: num_with_list})
    absent = presence.absent_optional
    report = DataReport(
        num_read,
        len(examples),
        dict(dropped),
        dict(+notes),  # Unary + removes zero counts.
        absent,
    )
    if not examples:
        hint = ""
        if dropped[_NO_ANSWER] == num_read:
            now = shown_path(columns.answer, absent)
            hint = f"; set data.columns.answer to the column that holds the answers (now {now})"
        raise UserError(f"{', '.join(presence.files)}: no row is usable: {report}{hint}")
    return examples, report


def expert_text(solution: str, part: ExpertPart = "thought") -> str:
    """Returns the part of a solution that is trained on.

    Args:
      solution: an expert's text.
      part: "thought" for the content of the first `<think>...</think>` if it is not blank, otherwise everything outside
        that block; "whole" for the entire text.

    >>> expert_text("<think>\\n1 + 1 = 2\\n</think>The answer is 2.")
    '1 + 1 = 2'
    >>> expert_text("<think>\\n\\n</think>The answer is 2.")
    'The answer is 2.'
    """
    before, opening, rest = solution.partition("<think>")
    thought, closing, after = rest.partition("</think>")
    if not (opening and closing) or part == "whole":
        return solution.strip()
    return thought.strip() or (before + after).strip()


def _example(
    row: Row, columns: Columns, default_source: str, expert_part: ExpertPart, needs_answer: bool
) -> Example:
    with reading("answer"):
        answer = _answer(row, columns)
    if needs_answer and not answer:
        raise _UnusableRow(_NO_ANSWER)
    with reading("source"):
        source = _source(row, columns) or default_source
    with reading("solutions"):
        texts = [
            expert_text(text, expert_part)
            for path in columns.solutions
            for text in _solutions(row, path)
        ]
    with reading("extra"):
        extra = {
            path.removesuffix("?").split(".")[-1]: _plain(parsed(look_up(row, path), "{"))
            for path in columns.extra
        }
    with reading("prompt"):
        prompt = _prompt(row, columns)
    solutions = tuple(dict.fromkeys(filter(None, texts)))
    example = Example(prompt, answer, solutions, source, extra)
    _check_texts(example)
    return example


def _source(row: Row, columns: Columns) -> str:
    source = look_up(row, columns.source) if columns.source else None
    if source is not None and not isinstance(source, str):
        raise wrong_type(columns.source, source, "text")
    return (source or "").strip()


def _prompt(row: Row, columns: Columns) -> Prompt:
    path = columns.prompt
    value = parsed(look_up(row, path), "[")
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise _UnusableRow("with an empty prompt")
    if isinstance(value, str):
        return value
    messages = messages_in(value)
    if messages is None:
        raise wrong_type(path, value, "text or a list of chat messages (role, content)")
    if path in columns.solutions and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        role = shown(messages[-1].role) if messages else "nothing"
        raise WrongValue(path, f"ends with the role {role}, not 'user'")
    if not messages[-1].content.strip():
        raise _UnusableRow("with an empty prompt")
    return messages


def _answer(row: Row, columns: Columns) -> str:
    """Returns the answer as text; empty if there is none."""
    value = look_up(row, columns.answer)
    if value is None or value != value:  # pandas writes null as NaN
        return ""
    if isinstance(value, float | decimal.Decimal):
        if not math.isfinite(value):
            raise _UnusableRow("with an answer that is not a finite number")
        if isinstance(value, float):
            value = np.format_float_positional(value, trim="-")  # 0.00001, not 1e-05
        else:
            value = _trimmed(f"{value:f}")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise wrong_type(columns.answer, value, "text or a number")
    if columns.answer_marker:
        _, marker, value = value.rpartition(columns.answer_marker)
        if not marker:
            raise _UnusableRow(f"without {columns.answer_marker} in the answer")
    value = value.strip()
    is_grouped = columns.answer_marker and _THOUSANDS.fullmatch(value)
    return value.replace(",", "") if is_grouped else value


def _trimmed(number: str) -> str:
    """Returns a decimal number without trailing zeros in its fraction."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def _plain(value: Any) -> Any:
    """Converts a value to JSON-serializable types."""
    text = json.dumps(value, default=str)
    if len(text) > MAX_ROW_CHARS:
        raise _UnusableRow(_TOO_LONG)
    return json.loads(text)


def _solutions(row: Row, path: str) -> list[str]:
    value = parsed(look_up(row, path), "[")
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return [text for text in value if text]
    messages = messages_in(value)
    if messages is None:
        raise wrong_type(path, value, "text, a list of strings, or chat messages")
    return [message.content for message in messages if message.role == "assistant"][-1:]


def _has_alternatives(row: Row, columns: Columns) -> bool:
    return any(len(_solutions(row, path)) > 1 for path in columns.solutions)


def _check_texts(example: Example) -> None:
    """Rejects overlong rows and unpaired surrogates, which JSON allows but tokenizers and files do not."""
    prompt = example.prompt
    texts = (
        [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message]
    )
    texts += [example.answer, *example.solutions, example.source]
    if sum(map(len, texts)) > MAX_ROW_CHARS:
        raise _UnusableRow(_TOO_LONG)
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise _UnusableRow("with text that is not Unicode") from None
