"""Maps the columns of a dataset to examples.

A path is the name of a column, which may contain dots, or a column and fields inside it, separated by dots
(`reward_model.ground_truth`). Objects and chats that a column stores as JSON text are parsed. A field that is absent
from a row counts as null. A path that ends in `?` may be absent from every row of a file; others must be in some row.
"""

import contextlib
import dataclasses
import decimal
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from trapo_jax.config import ColumnPreset
from trapo_jax.data.examples import DataReport, Example, Message, Prompt
from trapo_jax.data.sources import Row
from trapo_jax.files import shown
from trapo_jax.types import ExpertPart, UserError


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a row holds what.

    Attributes:
      prompt: text, or a list of chat messages (`role` and `content`, or `from` and `value` as in ShareGPT) that ends
        with the user's. If `solutions` names the same path, the assistant's last message is the solution.
      answer: text or a number.
      solutions: paths, in order of preference; each holds one solution as text or as chat messages, or a
        list of texts. Without any, the problems are never guided.
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


COLUMN_PRESETS: Mapping[ColumnPreset, Columns] = {
    # `answer_list` first: its order is what the released code calls first and second expert.
    "verl": Columns(
        "prompt",
        "reward_model.ground_truth",
        ("extra_info.answer_list?", "target?"),
        "data_source?",
    ),
    "trl": Columns("prompt", "answer", ("solution?",), "source?"),
    "numina": Columns("problem", "answer", ("solution?",), "source?"),
    "gsm8k": Columns("question", "answer", ("answer",), answer_marker="####"),
    "qa": Columns("question", "answer", ("solution?",), "source?"),
    "prompt_completion": Columns("prompt", "answer?", ("completion",), "source?"),
    "messages": Columns("messages", "answer?", ("messages",), "source?"),
    "sharegpt": Columns("conversations", "answer?", ("conversations",), "source?"),
}

MAX_ROW_CHARS = (
    1_000_000  # of all texts that are used of a row; far beyond the context of any model
)
MAX_LISTED = 20  # columns in an error message
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
_ABSENT = object()
_NO_ANSWER = "with an empty answer"
_TOO_LONG = f"with more than {MAX_ROW_CHARS:,} characters"


class _UnusableRow(Exception):
    """Why a row is dropped; caught and counted."""


def examples_from_rows(
    rows: Iterable[Row],
    columns: Columns,
    *,
    default_source: str = "",
    expert_part: ExpertPart = "thought",
    needs_answer: bool = True,
) -> tuple[list[Example], DataReport]:
    """Maps rows to examples.

    A row whose prompt is empty, null or absent, or whose text is not Unicode or longer than `MAX_ROW_CHARS`, is dropped
    and counted, and so is a row without an answer if answers are needed.

    Args:
      rows: from `read_rows`.
      columns: a preset or your own.
      default_source: the source of rows that name none.
      expert_part: which part of a solution's text is the expert solution; see `expert_text`.
      needs_answer: whether a row without an answer is dropped; its answer is empty otherwise.

    Returns:
      The examples in the order of the rows, and what was dropped.

    Raises:
      UserError: naming file, row and column, for a value of the wrong type or a column that no row of a file has;
        with the counts, if no row is usable.
    """
    if not needs_answer and not columns.answer.endswith("?"):
        columns = dataclasses.replace(columns, answer=columns.answer + "?")
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    presence = _Presence(columns)
    num_read = 0
    for row in rows:
        num_read += 1
        presence.observe(row)
        try:
            examples.append(_example(row, columns, default_source, expert_part, needs_answer))
        except _UnusableRow as reason:
            dropped[str(reason)] += 1
    presence.check()
    num_without = sum(not example.solutions for example in examples)
    notes = {"without an expert solution": num_without} if num_without else {}
    report = DataReport(num_read, len(examples), dict(dropped), notes)
    if not examples:
        hint = ""
        if dropped[_NO_ANSWER] == num_read and columns.answer.endswith("?"):
            hint = f"; set data.columns.answer to the column of the answers (now {columns.answer})"
        raise UserError(f"data: no row of {presence.files()} is usable: {report}{hint}")
    return examples, report


def find_preset(row: Row) -> ColumnPreset:
    """Returns the preset whose prompt, answer and solutions are in a row.

    Raises:
      UserError: naming the columns of the row, if none fits.
    """
    for name, preset in COLUMN_PRESETS.items():
        paths = (preset.prompt, preset.answer, *preset.solutions)
        with contextlib.suppress(UserError):  # a text where the preset has an object
            is_complete = all(path.endswith("?") or _is_present(row, path) for path in paths)
            if is_complete and preset.answer_marker in str(_look_up(row, preset.answer)):
                return name
    raise UserError(
        f"{row.file}: the columns are {_list_paths(row)}, which fits no preset; set "
        "data.columns.prompt, data.columns.answer and data.columns.solutions"
    )


class _Presence:
    """Checks that every path is in some row of each file, so that a misspelled column is no row without a value."""

    def __init__(self, columns: Columns):
        paths = (columns.prompt, columns.answer, *columns.solutions, columns.source, *columns.extra)
        self._paths = [path for path in paths if path and not path.endswith("?")]
        self._absent: dict[str, list[str]] = {}
        self._first: dict[str, Row] = {}

    def observe(self, row: Row) -> None:
        if row.file not in self._first:
            self._first[row.file] = row
            self._absent[row.file] = list(self._paths)
        absent = self._absent[row.file]
        if absent:
            self._absent[row.file] = [path for path in absent if not _is_present(row, path)]

    def check(self) -> None:
        for file, absent in self._absent.items():
            for path in absent:
                there = _list_paths(self._first[file])
                raise UserError(
                    f"{file}: no row has the column {path!r}; the first row has {there}; set data.columns to the "
                    "columns of the file"
                )

    def files(self) -> str:
        """Returns the names of the files, for an error message."""
        first, *others = self._absent or ["no file"]
        return first + (f" and {len(others)} more" if others else "")


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
    before, opening, rest = solution.partition("<think>")
    thought, closing, after = rest.partition("</think>")
    if not (opening and closing) or part == "whole":
        return solution.strip()
    return thought.strip() or (before + after).strip()


def _example(
    row: Row, columns: Columns, default_source: str, expert_part: ExpertPart, needs_answer: bool
) -> Example:
    answer = _answer(row, columns)
    if needs_answer and not answer:
        raise _UnusableRow(_NO_ANSWER)
    source = _look_up(row, columns.source) if columns.source else None
    if source is not None and not isinstance(source, str):
        raise _wrong_type(row, columns.source, source, "text")
    solutions = [text for path in columns.solutions for text in _solutions(row, path)]
    extra = {
        path.removesuffix("?").split(".")[-1]: _plain(_parsed(_look_up(row, path), "{"))
        for path in columns.extra
    }
    example = Example(
        _prompt(row, columns),
        answer,
        tuple(dict.fromkeys(text for s in solutions if (text := expert_text(s, expert_part)))),
        source or default_source,
        extra,
    )
    _check_texts(example)
    return example


def _prompt(row: Row, columns: Columns) -> Prompt:
    path = columns.prompt
    value = _parsed(_look_up(row, path), "[")
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise _UnusableRow("with an empty prompt")
    if isinstance(value, str):
        return value
    messages = _messages(value)
    if messages is None:
        raise _wrong_type(row, path, value, "text or a list of chat messages (role, content)")
    if path in columns.solutions and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        role = shown(messages[-1].role) if messages else "nothing"
        raise _error(row, path, f"ends with the role {role}, not with the user's")
    if not messages[-1].content.strip():
        raise _UnusableRow("with an empty prompt")
    return messages


def _answer(row: Row, columns: Columns) -> str:
    """Returns the answer as text; empty if there is none."""
    value = _look_up(row, columns.answer)
    if value is None or value != value:  # NaN is how pandas writes null
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
        raise _wrong_type(row, columns.answer, value, "text or a number")
    if columns.answer_marker:
        _, marker, value = value.rpartition(columns.answer_marker)
        if not marker:
            raise _UnusableRow(f"without {columns.answer_marker} in the answer")
    value = value.strip()
    is_grouped = columns.answer_marker and _THOUSANDS.fullmatch(value)
    return value.replace(",", "") if is_grouped else value


def _trimmed(number: str) -> str:
    """Returns a decimal number without zeros at the end of its fraction."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def _plain(value: Any) -> Any:
    """Returns a value as JSON can hold it."""
    text = json.dumps(value, default=str)
    if len(text) > MAX_ROW_CHARS:
        raise _UnusableRow(_TOO_LONG)
    return json.loads(text)


def _solutions(row: Row, path: str) -> list[str]:
    value = _parsed(_look_up(row, path), "[")
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
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        messages.append(Message(_ROLES.get(role, role), content))
    return tuple(messages)


def _parsed(value: Any, opening: str) -> Any:
    """Returns what a JSON text holds that is an object (`{`) or a chat (`[`); any other value as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith(opening)):
        return value
    if len(value) > MAX_ROW_CHARS:  # Parsing it could take much more memory than the text.
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_meant = isinstance(parsed, dict) if opening == "{" else _messages(parsed) is not None
    return parsed if is_meant else value


def _look_up(row: Row, path: str) -> Any:
    """The value at a path; None if it is null or absent."""
    value = _find(row, row.values, path.removesuffix("?"), path)
    return None if value is _ABSENT else value


def _is_present(row: Row, path: str) -> bool:
    """Whether a path is in a row, be it null; nothing is absent from a field that is null itself."""
    return _find(row, row.values, path.removesuffix("?"), path) is not _ABSENT


def _find(row: Row, values: Any, name: str, path: str) -> Any:
    """The value of a field of an object, whose name may itself contain dots; `_ABSENT` if there is none."""
    if values is None:
        return None
    values = _parsed(values, "{")
    if not isinstance(values, dict):
        raise _wrong_type(row, path, values, f"an object with a field {name!r}")
    if name in values:
        return values[name]
    for i in range(len(name) - 1, 0, -1):
        if name[i] == "." and name[:i] in values:
            return _find(row, values[name[:i]], name[i + 1 :], path)
    return _ABSENT


def _check_texts(example: Example) -> None:
    """Refuses half surrogate pairs, which JSON can spell but no tokenizer and no file takes, and overlong rows."""
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


def _wrong_type(row: Row, path: str, value: Any, wanted: str) -> UserError:
    return _error(row, path, f"is {type(value).__name__} ({shown(value)}), not {wanted}")


def _error(row: Row, path: str, mistake: str) -> UserError:
    name = path.removesuffix("?")
    return UserError(
        f"{row.file}, row {row.number}, column {name!r}: {mistake}; set data.columns to how the rows look"
    )


def _list_paths(row: Row) -> str:
    """Returns the first columns of a row, those inside objects with their dots, for an error message."""
    paths = list(islice(_paths(row.values, max_depth=5), MAX_LISTED + 1))
    return ", ".join(path[:100] for path in paths[:MAX_LISTED]) + (
        ", ..." if len(paths) > MAX_LISTED else "" if paths else "none"
    )


def _paths(values: Mapping[str, Any], *, max_depth: int) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value and max_depth:
            yield from (f"{name}.{path}" for path in _paths(value, max_depth=max_depth - 1))
        else:
            yield name
