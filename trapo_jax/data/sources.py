"""Rows from local files and from the Hugging Face Hub.

Local files are read in place, a piece at a time, and leave no cache behind: Parquet and Arrow by pyarrow, JSON and CSV
by line, so that a mistake has a line number. All values of CSV files are texts. Folders made by `save_to_disk` and Hub
datasets go through `datasets` (Hub files into its usual cache; see `hub_datasets`).
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from trapo_jax.data.hub_datasets import HubDataset, parse_hub_dataset, read_hub_rows
from trapo_jax.paths import USE_LFS, did_you_mean, is_lfs_pointer, working_directory
from trapo_jax.types import UserError

_READ_ROWS = 256
# What pyarrow and datasets raise on a damaged or absent file; ArrowInvalid is a ValueError.
_READ_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


class Row(NamedTuple):
    """One row of the data.

    Attributes:
      file: the file or Hub id it comes from.
      number: 1 for its first row; in a JSONL or CSV file the line.
      values: by column.
    """

    file: str
    number: int
    values: dict[str, Any]


def read_rows(data: Sequence[str], *, split: str = "train") -> Iterator[Row]:
    """Yields the rows of all of `data`, in order; `itertools.islice` takes the first few.

    Args:
      data: files (`.parquet`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.arrow`), globs of such files, folders written by
        `save_to_disk`, and Hub ids (`owner/name@revision:config`, where the revision and the config are optional). A
        folder or Hub id may end with `#split`. An entry that exists as a path is a path.
      split: the split of folders and Hub ids that do not name one; files have no splits.

    Raises:
      UserError: naming the file, and the line where there is one: nothing there, no permission, empty,
        damaged, not UTF-8, a Git-LFS pointer, an unknown format; a dataset that is neither in a cache nor on the Hub.
    """
    if not data:
        raise UserError("no data: give files, folders or Hub ids")
    locations = [location for entry in data for location in _locate(entry, split)]
    for location, split_of_location in locations:
        number = 0
        for number, values in _read(location, split_of_location):
            yield Row(str(location), number, values)
        if number == 0:
            raise UserError(f"{location}: holds no rows")


def _locate(entry: str, split: str) -> list[tuple[Path | HubDataset, str]]:
    """Returns the files and folders, or the Hub dataset, that an entry stands for, each with its split."""
    path = Path(entry).expanduser()
    if _exists(path, entry):
        return [(path, split)]
    if any(character in entry for character in "*?["):
        if matches := sorted(glob(str(path), recursive=True)):
            return [(Path(match), split) for match in matches]
        raise UserError(f"{entry}: no file here matches, or its folder may not be read")
    name, _, named_split = entry.rpartition("#")
    if name and named_split:
        path = Path(name).expanduser()
        if _exists(path, entry):
            if path.is_dir():
                return [(path, named_split)]
            raise UserError(
                f"{entry}: {name} is a file, which has no splits; leave out #{named_split}"
            )
        entry, split = name, named_split
    if path.suffix.lower() not in _READERS and (dataset := parse_hub_dataset(entry)):
        return [(dataset, split)]
    where = working_directory(path)
    raise UserError(f"{entry}: no such file or folder{where}{did_you_mean(entry)}")


def _exists(path: Path, entry: str) -> bool:
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{entry}: cannot be read ({_reason(error)})") from error


def _read(location: Path | HubDataset, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if isinstance(location, HubDataset):
            yield from enumerate(read_hub_rows(location, split), start=1)
        elif location.is_dir():
            yield from enumerate(_folder_rows(location, split), start=1)
        else:
            yield from _file_reader(location)(location)
    except _READ_ERRORS as error:
        raise UserError(f"{location}: damaged or not readable ({_reason(error)})") from error


def _file_reader(path: Path):
    """Who reads the file, by its name; what is plainly wrong with it is said first."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise UserError(f"{path}: format {path.suffix or 'without suffix'!r} unknown; have {known}")
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file")
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {USE_LFS}")
    return reader


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_READ_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield number, values


def _arrow_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Both Arrow IPC formats: files, and streams as `datasets` writes them."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, _READ_ROWS):
                for values in batch.slice(start, _READ_ROWS).to_pylist():
                    number += 1
                    yield number, values


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line, or one list of objects."""
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        for number, line in lines:
            if number == 1 and _text(path, number, line).lstrip().startswith("["):
                whole = line + file.read()
                yield from _json_list(path, whole)
                return
            text = _text(path, number, line)
            if (
                text := text.strip()
            ):  # else a mistake at the end would be reported for the next line
                yield number, _json_object(path, "line", number, _parse_json(path, number, text))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Values separated by commas, semicolons or tabs; the first line names the columns."""
    with path.open("rb") as file:
        lines = (_text(path, number, line) for number, line in enumerate(file, start=1))
        first = next(lines)
        delimiter = max(",;\t", key=first.count)
        # A value in quotation marks may have several lines.
        reader = csv.reader(
            chain([first], lines), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        try:
            header = next(reader)
            if repeated := [name for name, count in Counter(header).items() if count > 1]:
                raise UserError(f"{path}, line 1: two columns are named {repeated[0]!r}")
            for values in filter(None, reader):
                if len(values) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(values)} values for the {len(header)} columns of the first "
                        f"line; put values that contain {delimiter!r} in quotation marks"
                    )
                yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _json_list(path: Path, whole: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = whole.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    for number, value in enumerate(_parse_json(path, 1, text), start=1):
        yield number, _json_object(path, "row", number, value)


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 (byte {error.start + 1}, {error.reason}); "
            "convert the file, for example with iconv"
        ) from error


def _parse_json(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(
            f"{path}, line {line}: not JSON ({error.msg} at column {error.colno}); one object a line, "
            "or one list of objects"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, an integer too long
        raise UserError(f"{path}, line {number}: not JSON ({_reason(error)})") from error


def _json_object(path: Path, unit: str, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {unit} {number}: a JSON {type(value).__name__}, not an object")
    return value


def _folder_rows(folder: Path, split: str) -> Iterator[Any]:
    names = os.listdir(folder)
    if "dataset_dict.json" not in names and "state.json" not in names:
        raise UserError(
            f"{folder}: a folder, but not one made by save_to_disk; give its files, for example "
            f"{folder}/*.parquet"
        )
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(map(str, data))}")
        data = data[split]
    yield from data


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


_READERS = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".arrow": _arrow_rows,
}
