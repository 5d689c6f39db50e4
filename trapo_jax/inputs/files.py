"""Reads untrusted files with size limits.

An untrusted file may be larger than memory, or may be a named pipe or a device, which may never end.
"""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trapo_jax.inputs.paths import USE_LFS, is_lfs_pointer
from trapo_jax.types import UserError

MAX_BYTES = 16 * 2**20  # size limit of a text file or line
# Maximum number of lists and objects in a JSON file: an empty list takes 3 bytes in the file, but 64 in memory.
MAX_CONTAINERS = 2_000_000
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: Path) -> None:
    """Checks that a path is a regular file, or a link to one, without opening it.

    Raises:
      UserError: if the path is something else or cannot be accessed. The message names the path and the reason.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL character.
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from error
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: {KINDS.get(kind, 'a special file')}, not a regular file")


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file.

    Raises:
      UserError: if the file cannot be read or is larger than `max_bytes`. The message is one line that names the file.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes:,} bytes, the limit for such a file")
    return content


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Reads a UTF-8 text file; see `read_bytes`."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object; see `read_bytes`."""
    text = read_text(path, max_bytes=max_bytes)
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise UserError(f"{path}: more than {MAX_CONTAINERS:,} lists and objects")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise UserError(f"{path}: {USE_LFS}") from error
        raise UserError(f"{path}: not valid JSON ({reason_of(error)})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def read_lines(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each line of a regular file; see `split_lines`.

    Raises:
      UserError: if the file is not a regular file, or a line is longer than `max_bytes`.
      OSError: if the file cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        yield from split_lines(file, f"{path}, line", max_bytes=max_bytes)


def split_lines(
    file: IO[bytes], unit: str, *, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each line, including its line break, if it has one.

    Args:
      file: the file to read from.
      unit: a description of the lines for the error message, such as "rows.jsonl, line".
      max_bytes: maximum length of a line.

    Raises:
      UserError: if a line is longer than `max_bytes`.
    """
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise UserError(f"{unit} {number}: longer than {max_bytes:,} bytes")
        yield number, line


def shown(value: object, *, max_chars: int = 60) -> str:
    """Returns the start of a value's `repr`, for an error message."""
    if isinstance(value, str) and len(value) > max_chars:
        return repr(value[:max_chars]) + "..."
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deeply nested, or an integer with more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's message, without the file name in the message of an `OSError`."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]
