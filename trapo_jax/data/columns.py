"""Which column of a row is what, and rows to examples.

A path is a column, or with dots a field inside it (`reward_model.ground_truth`); one that ends in `?` may be
missing.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trapo_jax.data.examples import DataReport, Example, Message, Prompt
from trapo_jax.data.sources import Row
from trapo_jax.types import ExpertPart, UserError


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a row holds what.

    Attributes:
      prompt: text, or a list of chat messages (`role`, `content`) that ends with the user's.
      answer: text or a number.
      solutions: paths, in order of preference; each holds one solution as text or as chat messages, or a
        list of texts. None: the problems are never guided.
      source: text under which results are grouped; empty for none.
      answer_marker: where not empty, the answer is what follows its last occurrence.
      extra: further columns, for reward functions; the last part of a path is the column's name there.
    """

    prompt: str
    answer: str
    solutions: tuple[str, ...] = ()
    source: str = ""
    answer_marker: str = ""
    extra: tuple[str, ...] = ()


COLUMN_PRESETS: Mapping[str, Columns] = {
    "trl": Columns("prompt", "answer", ("solution?",), "source?"),
    # `answer_list` first: its order is what the released code calls first and second expert.
    "verl": Columns(
        "prompt",
        "reward_model.ground_truth",
        ("extra_info.answer_list?", "target?"),
        "data_source?",
    ),
    "gsm8k": Columns("question", "answer", ("answer",), answer_marker="####"),
}

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_MISSING = object()


class _UnusableRow(Exception):
    """Why a row is dropped; caught and counted."""


def examples_from_rows(
    rows: Iterable[Row],
    columns: Columns,
    *,
    default_source: str = "",
    expert_part: ExpertPart = "thought",
) -> tuple[list[Example], DataReport]:
    """Maps rows to examples.

    A row with an empty (or null) prompt or answer, or text that is not Unicode, is dropped and counted.

    Args:
      rows: from `read_rows`.
      columns: a preset or your own.
      default_source: the source of rows that name none.
      expert_part: which part of a solution's text is the expert solution; see `expert_text`.

    Returns:
      The examples in the order of the rows, and what was dropped.

    Raises:
      UserError: naming file, row and column, for a column that is missing or of the wrong type; with
        the counts, if nothing is usable.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    num_read = 0
    for row in rows:
        num_read += 1
        try:
            examples.append(_example(row, columns, default_source, expert_part))
        except _UnusableRow as reason:
            dropped[str(reason)] += 1
    num_without = sum(not example.solutions for example in examples)
    notes = {"without an expert solution": num_without} if num_without else {}
    report = DataReport(num_read, len(examples), dict(dropped), notes)
    if not examples:
        raise UserError(f"the data hold no usable row: {report}")
    return examples, report


def expert_text(solution: str, part: ExpertPart = "thought") -> str:
    """Returns the part of a solution that is trained.

    Args:
      solution: an expert's text.
      part: "thought" for the inside of the first `<think>...</think>` if it is not blank, or else all but that pair;
        "whole" for all of the text.

    >>> expert_text("<think>\\n1 + 1 = 2\\n</think>The answer is 2.")
    '1 + 1 = 2'
    >>> expert_text("<think>\\n\\n</think>The answer is 2.")
    'The answer is 2.'
    """
    thought = _THINK.search(solution)
    if thought is None or part == "whole":
        return solution.strip()
    return thought[1].strip() or _THINK.sub("", solution, count=1).strip()


def _example(row: Row, columns: Columns, default_source: str, expert_part: ExpertPart) -> Example:
    answer = _answer(row, columns)
    source = _look_up(row, columns.source) if columns.source else None
    if source is not None and not isinstance(source, str):
        raise _wrong_type(row, columns.source, source, "text")
    solutions = [text for path in columns.solutions for text in _solutions(row, path)]
    example = Example(
        _prompt(row, columns.prompt),
        answer,
        tuple(dict.fromkeys(text for s in solutions if (text := expert_text(s, expert_part)))),
        source or default_source,
        {
            path.removesuffix("?").split(".")[-1]: _plain(_look_up(row, path))
            for path in columns.extra
        },
    )
    _check_unicode(example)
    return example


def _prompt(row: Row, path: str) -> Prompt:
    value = _look_up(row, path)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise _UnusableRow("with an empty prompt")
    if isinstance(value, str):
        return value
    messages = _messages(value)
    if messages is None:
        raise _wrong_type(row, path, value, "text or a list of chat messages (role, content)")
    if messages[-1].role != "user":
        raise _error(row, path, f"ends with the role {messages[-1].role!r}, not with the user's")
    if not messages[-1].content.strip():
        raise _UnusableRow("with an empty prompt")
    return messages


def _answer(row: Row, columns: Columns) -> str:
    value = _look_up(row, columns.answer)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _UnusableRow("with an empty answer")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _UnusableRow("with an answer that is not a finite number")
        value = np.format_float_positional(value, trim="-")  # 0.00001, not 1e-05
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _wrong_type(row, columns.answer, value, "text or a number")
    if columns.answer_marker:
        _, marker, value = value.rpartition(columns.answer_marker)
        if not marker:
            raise _UnusableRow(f"without {columns.answer_marker} in the answer")
    value = value.strip()
    if not value:
        raise _UnusableRow("with an empty answer")
    is_grouped = columns.answer_marker and _THOUSANDS.fullmatch(value)
    return value.replace(",", "") if is_grouped else value


def _plain(value: Any) -> Any:
    """Returns a value as JSON can hold it."""
    return json.loads(json.dumps(value, default=str))


def _solutions(row: Row, path: str) -> list[str]:
    value = _look_up(row, path)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return [text for text in value if text]
    messages = _messages(value)
    if messages is None:
        raise _wrong_type(row, path, value, "text, a list of texts or chat messages")
    return [message.content for message in messages if message.role == "assistant"][-1:]


def _messages(value: Any) -> tuple[Message, ...] | None:
    """The chat messages, or None if the value is something else."""
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict):
            return None
        if not all(isinstance(message.get(name), str) for name in Message._fields):
            return None
    return tuple(Message(message["role"], message["content"]) for message in value)


def _look_up(row: Row, path: str) -> Any:
    """The value at a path; None where it is null, or missing from an optional path."""
    value: Any = row.values
    for name in path.removesuffix("?").split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise _wrong_type(row, path, value, f"an object with a field {name!r}")
        value = value.get(name, _MISSING)
        if value is _MISSING:
            if path.endswith("?"):
                return None
            raise _missing(row, path)
    return value


def _check_unicode(example: Example) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    prompt = example.prompt
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    try:
        for text in (*texts, example.answer, *example.solutions, example.source):
            text.encode()
    except UnicodeEncodeError:
        raise _UnusableRow("with text that is not Unicode") from None


def _missing(row: Row, path: str) -> UserError:
    return _error(row, path, f"missing; there are {', '.join(_paths(row.values)) or 'no columns'}")


def _wrong_type(row: Row, path: str, value: Any, wanted: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return _error(row, path, f"is {type(value).__name__} ({shown}), not {wanted}")


def _error(row: Row, path: str, mistake: str) -> UserError:
    name = path.removesuffix("?")
    return UserError(
        f"{row.file}, row {row.number}, column {name!r}: {mistake}; set data.columns to how the rows look"
    )


def _paths(values: Mapping[str, Any]) -> list[str]:
    """The columns, those inside objects with their dots."""
    found = []
    for name, value in values.items():
        inside = _paths(value) if isinstance(value, dict) else []
        found += [f"{name}.{path}" for path in inside] or [name]
    return found
