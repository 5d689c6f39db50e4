"""Defines which columns of a row hold which fields of an example, presets for known datasets, and lookup by path.

A path is the name of a column, which may contain dots, or the names of a column and of fields nested inside the column,
separated by dots (`reward_model.ground_truth`). Objects and chats that a column stores as JSON text are parsed. A field
that is absent from a row counts as null. A path that ends in `?` may be absent from every row of a file; every other
path must be present in at least one row.

To add a preset, add it to `COLUMN_PRESETS` here, and add its name to `ColumnPreset` in `config/schema.py`. The first
preset that fits the data is used, so the order matters.
"""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from trapo_jax.config import ColumnPreset
from trapo_jax.data.examples import Message
from trapo_jax.data.sources import Row
from trapo_jax.inputs.files import shown
from trapo_jax.types import UserError

# Maximum length of the text used from a row; far beyond a model's context.
MAX_ROW_CHARS = 1_000_000
MAX_PATHS, MAX_DEPTH = 1000, 5  # Limits on the columns searched for a similar name.
MAX_LISTED, MAX_PATH_CHARS = 20, 100  # Limits on the columns listed in an error message.
_ABSENT = object()
REQUIRED = ("prompt", "answer", "solutions")  # The fields of `Columns` that determine the preset.
FIELDS = (*REQUIRED, "source", "extra")  # The fields of `Columns` that hold paths.
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for roles.


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that hold an example's fields.

    Attributes:
      prompt: path of the prompt: text, or a list of chat messages (`role` and `content`, or `from` and `value` as in
        ShareGPT) that ends with a user message. If `solutions` names the same path, the assistant's last message is
        the solution.
      answer: path of the answer: text or a number.
      solutions: paths of solutions, in order of preference; each holds one solution as text or as chat messages, or a
        list of strings. If there are none, rollouts are never guided.
      source: path of the text used to group results; empty for none.
      answer_marker: if not empty, the answer is the text after its last occurrence.
      extra: paths of additional columns for reward functions, which receive each column under the last part of its
        path.
    """

    prompt: str
    answer: str
    solutions: tuple[str, ...] = ()
    source: str = ""
    answer_marker: str = ""
    extra: tuple[str, ...] = ()


COLUMN_PRESETS: Mapping[ColumnPreset, Columns] = {
    # `answer_list` comes first: the order of its entries defines the first and second expert in the authors' code.
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


class WrongValue(Exception):
    """Raised with a clause that says what is wrong with the value at a path; caught and turned into a `UserError`."""

    def __init__(self, path: str, mistake: str):
        super().__init__(path, mistake)
        self._path, self._mistake = path, mistake
        self.field: str | None = None  # the field of `Columns` being read

    def explained(self, row: Row, columns: Columns) -> UserError:
        """Returns an error for the user that names the row and the option to change."""
        option = self.field or next(x for x in FIELDS if self._path in _paths_of(columns, x))
        return UserError(
            f"{row.file}, row {row.number}, column {self._path.removesuffix('?')!r}: {self._mistake}; set "
            f"data.columns.{option} to another column, or correct the row"
        )


@contextlib.contextmanager
def reading(field: str) -> Iterator[None]:
    """Records in a `WrongValue` which field of `Columns` was being read, because several fields may share a path."""
    try:
        yield
    except WrongValue as error:
        error.field = field
        raise


def merge_rows(rows: Sequence[Row]) -> Row:
    """Returns a row with the columns of all rows that come from the file of the first, with the first values found.

    A column's value is null only if it is null in all rows.
    """
    values: dict[str, Any] = {}
    for row in rows:
        if row.file == rows[0].file:
            values |= {name: x for name, x in row.values.items() if values.get(name) is None}
    return rows[0]._replace(values=values)


def find_preset(
    row: Row, given: Mapping[str, Any] = MappingProxyType({}), *, needs_answer: bool = True
) -> ColumnPreset:
    """Returns the first preset whose columns for the prompt, the answer and the solutions are in a row.

    Args:
      row: the columns of the data, such as those of the first rows; see `merge_rows`.
      given: values of the fields of `Columns` that the config sets itself; the row need not have the preset's columns
        for them. If they include the prompt or the answer, the simplest layout, `trl`, is preferred if it fits.
      needs_answer: whether an answer is needed; if not, and if no preset fits, a preset may also fit a row without an
        answer.

    Raises:
      UserError: if no preset fits. The message names the row's columns.
    """
    if {"prompt", "answer"} & {*given} and _fits(row, COLUMN_PRESETS["trl"], given):
        return "trl"
    for name, preset in COLUMN_PRESETS.items():
        if _fits(row, preset, given):
            return name
    for name, preset in COLUMN_PRESETS.items() if not needs_answer else ():
        has_solution = any(_is_present(row, path) for path in preset.solutions)
        if has_solution and _fits(row, preset, {**given, "answer": preset.answer}):
            return name
    missing = [field for field in REQUIRED if field not in given and not _is_usual(row, field)]
    options = {field: _option(row, field) for field in missing or REQUIRED}
    solutions = options.pop("solutions", None)
    wanted = " and ".join(options.values())
    if solutions:
        wanted += f"{', and ' if wanted else ''}{solutions} if there are worked solutions"
    raise UserError(
        f"{row.file}: the columns are {_listed(row)}, which fit no preset; set {wanted}"
    )


def _usual_paths(field: str) -> set[str]:
    """Returns the paths that presets use for a field; for solutions, only those that do not also hold answers."""
    paths = {
        path.removesuffix("?")
        for preset in COLUMN_PRESETS.values()
        for path in _paths_of(preset, field)
    }
    return paths - _usual_paths("answer") if field == "solutions" else paths


def _is_usual(row: Row, field: str) -> bool:
    """Returns whether a row has a column that some preset uses for a field."""
    return bool(_usual_paths(field) & {*_paths(row.values)})


def _option(row: Row, field: str) -> str:
    """Returns the config option for a field, with a suggestion if the row has a column with a similar name."""
    close = _closest(row, sorted(_usual_paths(field)))
    return f"data.columns.{field}" + (f" (perhaps to {close})" if close else "")


def _fits(row: Row, preset: Columns, given: Mapping[str, Any]) -> bool:
    answer = given.get("answer", preset.answer)
    marker = given.get("answer_marker", preset.answer_marker)
    with contextlib.suppress(WrongValue):  # a string where the preset expects an object
        return all(
            path.endswith("?") or _is_present(row, path)
            for field in REQUIRED
            if field not in given
            for path in _paths_of(preset, field)
        ) and (not preset.answer_marker or marker in str(look_up(row, answer)))
    return False


class Presence:
    """Checks that every path is in some row of each file. Otherwise, misspelled paths would pass as missing values."""

    def __init__(self, columns: Columns):
        self._paths: dict[str, str] = {}  # the first field that uses each path, keyed by path
        self._absent_optional: list[str] = []
        for field in FIELDS:
            for path in _paths_of(columns, field):
                if path.endswith("?"):
                    self._absent_optional.append(path)
                elif path:
                    self._paths.setdefault(path, field)
        self._absent: dict[str, list[str]] = {}
        self._first: dict[str, Row] = {}

    def observe(self, row: Row) -> None:
        if row.file not in self._first:
            self._first[row.file] = row
            self._absent[row.file] = list(self._paths)
        absent = self._absent[row.file]
        if absent:
            self._absent[row.file] = _absent_from(row, absent)
        if self._absent_optional:
            self._absent_optional = _absent_from(row, self._absent_optional)

    def check(self) -> None:
        for file, absent in self._absent.items():
            for path in absent:
                row = self._first[file]
                close = _closest(row, [path])
                raise UserError(
                    f"{file}: no row has the column {path!r}; the first row has {_listed(row)}; set "
                    f"data.columns.{self._paths[path]}" + (f", perhaps to {close}" if close else "")
                )

    @property
    def absent_optional(self) -> tuple[str, ...]:
        """The paths ending in `?` that no row of any file has."""
        return tuple(self._absent_optional)

    @property
    def files(self) -> list[str]:
        """The files that the rows come from."""
        return list(self._first)


def _absent_from(row: Row, paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not _is_present(row, path)]


def shown_path(path: str, absent: Collection[str]) -> str:
    """Returns a path as shown to the user.

    Args:
      path: a path as in `Columns`; empty for none.
      absent: paths that no row has.
    """
    return "none" if not path or path in absent else path.removesuffix("?")


def _paths_of(columns: Columns, field: str) -> tuple[str, ...]:
    value = getattr(columns, field)
    return (value,) if isinstance(value, str) else value


def _closest(row: Row, names: Sequence[str]) -> str | None:
    """Tries the names in order, and returns the first column that is similar to one of them; None if none is."""
    columns = {path.lower(): path for path in _paths(row.values)}
    for name in names:
        close = difflib.get_close_matches(name.lower(), columns, n=1, cutoff=0.75)
        if close:
            return columns[close[0]]
    return None


def _listed(row: Row) -> str:
    paths = [path[:MAX_PATH_CHARS] for path in _paths(row.values)]
    return ", ".join(paths[:MAX_LISTED] + ["..."] * (len(paths) > MAX_LISTED)) or "none"


def parsed(value: Any, opening: str) -> Any:
    """Parses a JSON string that holds an object (`{`) or a chat (`[`); returns any other value unchanged."""
    if not (isinstance(value, str) and value.lstrip().startswith(opening)):
        return value
    if len(value) > MAX_ROW_CHARS:  # Parsing could take much more memory than the string itself.
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_meant = isinstance(found, dict) if opening == "{" else messages_in(found) is not None
    return found if is_meant else value


def look_up(row: Row, path: str) -> Any:
    """Returns the value at a path; None if it is null or absent."""
    value = _find(row.values, path.removesuffix("?"), path)
    return None if value is _ABSENT else value


def _is_present(row: Row, path: str) -> bool:
    """Returns whether a row has a path, possibly with a null value. All paths inside a null field count as present."""
    return _find(row.values, path.removesuffix("?"), path) is not _ABSENT


def _find(values: Any, name: str, path: str) -> Any:
    """Returns the value of an object's field, whose name may contain dots; `_ABSENT` if there is none."""
    if values is None:
        return None
    values = parsed(values, "{")
    if not isinstance(values, dict):
        raise wrong_type(path, values, f"an object with a field {name!r}")
    if name in values:
        return values[name]
    for i in range(len(name) - 1, 0, -1):
        if name[i] == "." and name[:i] in values:
            return _find(values[name[:i]], name[i + 1 :], path)
    return _ABSENT


def wrong_type(path: str, value: Any, wanted: str) -> WrongValue:
    return WrongValue(path, f"is {type(value).__name__} ({shown(value)}), not {wanted}")


def _paths(values: Mapping[str, Any]) -> list[str]:
    """Returns at most `MAX_PATHS` paths of a row's columns, with dotted paths for fields inside objects."""
    return list(islice(_all_paths(values, MAX_DEPTH), MAX_PATHS))


def _all_paths(values: Mapping[str, Any], max_depth: int) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value and max_depth:
            yield from (f"{name}.{path}" for path in _all_paths(value, max_depth - 1))
        else:
            yield name


def messages_in(value: Any) -> tuple[Message, ...] | None:
    """Returns the chat messages; None if the value is something else."""
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
