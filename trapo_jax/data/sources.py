"""Reads rows from local files and from the Hugging Face Hub.

Local files are read incrementally, without creating a cache. Parquet and Arrow files are read with pyarrow in a
separate process; JSON and CSV files are read as text, so that error messages contain line numbers. All values in CSV
files are strings. Folders written by `save_to_disk` and Hub datasets are read with the `datasets` library, which keeps
Hub files in its usual cache (see `hub_datasets`).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trapo_jax.data.hub_datasets import HubDataset, parse_hub_dataset, read_hub_rows
from trapo_jax.data.text_rows import read_csv_rows, read_json_rows
from trapo_jax.inputs.files import check_regular, reason_of, split_lines
from trapo_jax.inputs.paths import USE_LFS, did_you_mean, is_lfs_pointer, working_directory
from trapo_jax.sandbox import child_environment
from trapo_jax.types import UserError

MAX_ROWS = 2_000_000  # Maximum number of rows per entry, unless a limit is set.
TEXT_READERS = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
}
COMPRESSED = {  # first bytes of a file -> the command that decompresses it
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
FORMATS = (".parquet", *TEXT_READERS, ".arrow")
TABLE_WORKER = (sys.executable, "-P", str(Path(__file__).with_name("table_worker.py")))
TABLE_SECS = 60  # Limit in CPU seconds for a few hundred rows.
TABLE_MEMORY_BYTES = 5 * 2**28
# Raised by pyarrow and datasets for a damaged or missing file; ArrowInvalid is a ValueError.
_READ_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


class Row(NamedTuple):
    """One row of the data.

    Attributes:
      file: file or Hub id that the row comes from.
      number: position in the file, starting at 1; the line number in a JSONL or CSV file.
      values: the row's values, keyed by column.
    """

    file: str
    number: int
    values: dict[str, Any]


def read_rows(
    data: Sequence[str], *, split: str = "train", limit: int | None = None
) -> Iterator[Row]:
    """Yields the rows of all entries of `data`, in order.

    Args:
      data: files (`.parquet`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.arrow`), globs of such files, folders written by
        `save_to_disk`, and Hub ids (`owner/name@revision:config`, where the revision and the config are optional). A
        folder or Hub id may end with `#split`. An entry that exists as a path is treated as a path.
      split: the split to read from folders and Hub ids that do not name a split; files have no splits.
      limit: number of rows to read from each entry; None for all, at most `MAX_ROWS`.

    Raises:
      UserError: if a file is missing, unreadable, empty, damaged, not UTF-8, a Git LFS pointer, or in an unknown
        format, or if a dataset is neither in a cache nor on the Hub. The message names the file or dataset and, if
        possible, the line.
    """
    if not data:
        raise UserError("no data: specify files, folders or Hub ids")
    located = [_locate(entry, split) for entry in data]
    for locations in located:
        yield from islice(_rows(locations, MAX_ROWS if limit is None else None), limit)


def _rows(
    locations: Sequence[tuple[Path | HubDataset, str]], max_rows: int | None
) -> Iterator[Row]:
    """Yields the rows of an entry."""
    num_rows = 0
    for location, split in locations:
        number = 0
        for number, values in _read(location, split, max_rows):
            num_rows += 1
            if max_rows is not None and num_rows > max_rows:
                raise _too_many_rows(location, "the number of rows is ")
            yield Row(str(location), number, values)
        if number == 0:
            raise UserError(f"{location}: contains no rows")


def _locate(entry: str, split: str) -> list[tuple[Path | HubDataset, str]]:
    """Returns the files and folders, or the Hub dataset, that an entry stands for, each with its split."""
    path = Path(entry).expanduser()
    if _exists(path, entry):
        return [(path, split)]
    if any(character in entry for character in "*?["):
        if matches := sorted(glob(str(path), recursive=True)):
            return [(Path(match), split) for match in matches]
        raise UserError(f"{entry}: no file matches, or the folder is not readable")
    name, _, named_split = entry.rpartition("#")
    if name and named_split:
        path = Path(name).expanduser()
        if _exists(path, entry):
            if path.is_dir():
                return [(path, named_split)]
            raise UserError(
                f"{entry}: {name} is a file, and files have no splits; remove #{named_split}"
            )
        entry, split = name, named_split
    if path.suffix.lower() not in FORMATS and (dataset := parse_hub_dataset(entry)):
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
        raise UserError(f"{entry}: cannot be read ({reason_of(error)})") from error


def _read(
    location: Path | HubDataset, split: str, max_rows: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if isinstance(location, HubDataset):
            yield from enumerate(read_hub_rows(location, split), start=1)
        elif location.is_dir():
            yield from enumerate(_folder_rows(location, split, max_rows), start=1)
        elif read := TEXT_READERS.get(_suffix(location)):
            yield from read(location)
        else:
            yield from _table_rows(location, max_rows)
    except _READ_ERRORS as error:
        raise UserError(f"{location}: damaged or not readable ({reason_of(error)})") from error


def _suffix(path: Path) -> str:
    """Returns the suffix of a file, after checking that the file is regular, not empty, and in a known format."""
    suffix = path.suffix.lower()
    check_regular(path)
    if tool := _compression_tool(path):
        raise UserError(f"{path}: a compressed file; decompress it with `{tool}` first")
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(
            f"{path}: unknown format ({path.suffix or 'no suffix'}); choose from {known}"
        )
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file")
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {USE_LFS}")
    return suffix


def _compression_tool(path: Path) -> str:
    """Returns the command that decompresses a file; an empty string if the file is not compressed."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((tool for magic, tool in COMPRESSED.items() if head.startswith(magic)), "")


def _table_rows(path: Path, max_rows: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a Parquet or Arrow file in a process with limits on time and memory; see `table_worker.py`."""
    worker = subprocess.Popen(
        [
            *TABLE_WORKER,
            path.absolute(),
            str(max_rows or 0),
            str(TABLE_SECS),
            str(TABLE_MEMORY_BYTES),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
    )
    assert worker.stdout is not None
    try:
        for number, line in split_lines(worker.stdout, f"{path}, row"):
            values = json.loads(line)
            if isinstance(values, str):  # the reason why the worker cannot continue
                raise OSError(values)
            if isinstance(values, int):
                raise _too_many_rows(path, f"{values:,} rows, ")
            yield number, values
        code = worker.wait()
        if code == -signal.SIGPROF:
            raise OSError(f"reading a few hundred rows takes more than {TABLE_SECS} s")
        if code:
            raise OSError(f"its reader exited with code {code}")
    finally:
        worker.kill()
        worker.stdout.close()
        worker.wait()


def _folder_rows(folder: Path, split: str, max_rows: int | None) -> Iterator[Any]:
    names = os.listdir(folder)
    if "dataset_dict.json" not in names and "state.json" not in names:
        raise UserError(
            f"{folder}: a folder, but not one written by save_to_disk; specify its files, for example "
            f"{folder}/*.parquet"
        )
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if not path.is_dir():
            check_regular(path)
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(map(str, data))}")
        data = data[split]
    if max_rows is not None and len(data) > max_rows:
        raise _too_many_rows(folder, f"{len(data):,} rows, ")
    yield from data


def _too_many_rows(location: Path | HubDataset, number: str) -> UserError:
    return UserError(
        f"{location}: {number}more than {MAX_ROWS:,}; set data.limit to the number of rows to read"
    )
