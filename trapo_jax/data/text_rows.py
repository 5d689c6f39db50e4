"""Reads rows from JSON files (JSON Lines, or a single JSON array of objects) and CSV files, piece by piece."""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from trapo_jax.inputs.files import MAX_BYTES, read_lines, reason_of
from trapo_jax.types import UserError

HEAD_BYTES = 1024
CHUNK_BYTES = 2**20
# A JSON error this close to the end of the buffer may be due to a truncated token.
MAX_TOKEN_CHARS = 16
WHITESPACE = " \t\r\n"
DELIMITERS = ",;\t"


def read_json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a file, each with its line number or its position in the array.

    Raises:
      UserError: if the content is malformed. The message names the file and the line.
      OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    rows = _rows_of_list(path) if head.startswith(b"[") else _rows_of_lines(path)
    for unit, number, value in rows:
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, {unit} {number}: a JSON {type(value).__name__}, not an object"
            )
        yield number, value


def _rows_of_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    for number, text in _read_text_lines(path):
        # Without the strip, a mistake at the end would be reported on the next line.
        if text := text.strip():
            try:
                yield "line", number, json.loads(text)
            except (RecursionError, ValueError) as error:
                if number == 1 and _looks_like_csv(text):
                    raise UserError(
                        f"{path}, line 1: not JSON, but perhaps CSV; if so, rename the file to end in .csv"
                    ) from error
                raise _not_json(path, number, error) from error


def _looks_like_csv(line: str) -> bool:
    """Returns whether a line may be the header of a CSV file."""
    return line[0] not in "{[" and any(line.count(delimiter) for delimiter in DELIMITERS)


def read_csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a file, each with its line number.

    Values are separated by commas, semicolons or tabs, and the first line names the columns.

    Raises:
      UserError: if the content is malformed. The message names the file and the line.
      OSError: if the file cannot be read.
    """
    lines = (text for _, text in _read_text_lines(path))
    first = next(lines)
    if first.lstrip().startswith(("{", "[")):
        raise UserError(
            f"{path}, line 1: not CSV, but perhaps JSON; if so, rename the file to end in .jsonl"
        )
    delimiter = max(DELIMITERS, key=first.count)
    # A value in quotation marks may span several lines.
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


def _read_text_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in read_lines(path):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 (byte {error.start + 1}, {error.reason}); "
                "convert the file, for example with iconv"
            ) from error


def _rows_of_list(path: Path) -> Iterator[tuple[str, int, Any]]:
    with path.open("rb") as file:
        text = _Text(path, file)
        text.expect("[")
        number = 0
        if text.peek() != "]":
            while number == 0 or text.peek() == ",":
                if number:
                    text.expect(",")
                number += 1
                yield "row", number, text.read_value()
        text.expect("]")
        if text.peek():
            raise text.error("Extra data")


class _Text:
    """A JSON file's text, read into memory piece by piece.

    Args:
      path: path of the file, for error messages.
      file: the open file.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._buffer, self._position = "", 0
        self._line = 1  # line number of the buffer's start
        self._is_complete = False

    def peek(self) -> str:
        """Returns the next non-whitespace character, or an empty string at the end of the file."""
        while True:
            rest = self._buffer[self._position : self._position + HEAD_BYTES]
            if stripped := rest.lstrip(WHITESPACE):
                self._position += len(rest) - len(stripped)
                return stripped[0]
            self._position += len(rest)
            if self._position == len(self._buffer) and not self._read_more():
                return ""

    def expect(self, character: str) -> None:
        """Skips the next non-whitespace character, which must be `character`."""
        if self.peek() != character:
            raise self.error(f"Expecting '{character}'")
        self._position += 1

    def read_value(self) -> Any:
        """Returns the next value."""
        self.peek()
        while True:
            try:
                value, self._position = self._parse(self._buffer, self._position)
                return value
            except (RecursionError, ValueError) as error:
                mistake = _not_json(self._path, self._line, error)
                if not (self._is_cut(error) and self._read_more()):
                    raise mistake from error
            if len(self._buffer) - self._position > MAX_BYTES:
                raise self.error(f"a value of more than {MAX_BYTES:,} characters")

    def _is_cut(self, error: Exception) -> bool:
        """Returns whether an error may be due to a truncated buffer."""
        return isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated string")
            or error.pos > len(self._buffer) - MAX_TOKEN_CHARS
        )

    def error(self, problem: str) -> UserError:
        """Returns an error at the current position."""
        line = self._line + self._buffer.count("\n", 0, self._position)
        return UserError(f"{self._path}, line {line}: not JSON ({problem})")

    def _read_more(self) -> bool:
        """Reads the next part of the file, at least as large as the buffer, and returns whether there was one."""
        if self._is_complete:
            return False
        self._line += self._buffer.count("\n", 0, self._position)
        self._buffer, self._position = self._buffer[self._position :], 0
        chunk = self._file.read(max(CHUNK_BYTES, len(self._buffer)))
        self._is_complete = not chunk
        try:
            self._buffer += self._decoder.decode(chunk, final=self._is_complete)
        except UnicodeDecodeError as error:
            line = self._line + self._buffer.count("\n")
            line += error.object.count(b"\n", 0, error.start)
            raise UserError(f"{self._path}, line {line}: not UTF-8 ({error.reason})") from error
        return not self._is_complete


def _not_json(path: Path, line: int, error: Exception) -> UserError:
    """Returns the error for a value that starts on the given line."""
    if isinstance(error, json.JSONDecodeError):
        message = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        return UserError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({message} at column {error.colno}); use JSON Lines "
            "(one object per line) or a single JSON array of objects"
        )
    return UserError(f"{path}, line {line}: not JSON ({reason_of(error)})")
