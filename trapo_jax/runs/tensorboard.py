"""TensorBoard events, written synchronously and allowed to fail.

Events are a copy of metrics.jsonl, so a failure costs no more than a warning. Scalars need little of the format, which
is written here: importing tensorboardX takes seconds, because it imports torch where that is installed, and its
`SummaryWriter` blocks for ever once its thread has died (a full disk, a clock that is set back).

An event file is a sequence of records: the length of the data, a checksum of the length, the data and a checksum of
the data. The data are `Event` protocol buffers (tensorflow/core/util/event.proto).
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

EVENTS = "events"  # the beginning of the names of event files
CRC32C_POLYNOMIAL = 0x82F63B78  # with reversed bits


class TensorBoard:
    """Writes scalars to an event file; after the first failure it warns once and discards them.

    Args:
      folder: the directory of the event files; created if it does not exist.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: BinaryIO | None = None
        # Two processes may start within a second on one host.
        name = f"{EVENTS}.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            self._file = open(folder / name, "ab")  # noqa: SIM115
        except OSError as error:
            self._disable(error)
        self._write(_file_version())

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes a scalar."""
        self._write(_scalar(name, value, step))

    def flush(self) -> None:
        """Flushes the events to disk."""
        self._call(lambda file: file.flush())

    def close(self) -> None:
        self._call(lambda file: file.close())
        self._file = None

    def _write(self, event: bytes) -> None:
        self._call(lambda file: file.write(_record(event)))

    def _call(self, function: Callable[[BinaryIO], object]) -> None:
        if self._file is None:
            return
        try:
            function(self._file)
        except (OSError, ValueError) as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self._file = None
        print(
            f"warning: {self._folder}: no more TensorBoard events are written ({getattr(error, 'strerror', error)}); "
            "metrics.jsonl has the same values",
            file=sys.stderr,
        )


def event_files(folder: Path) -> list[Path]:
    """Returns the event files in a directory, which may be missing."""
    return sorted(folder.glob(f"{EVENTS}.*"))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _file_version() -> bytes:
    return _event(0) + _bytes_field(3, b"brain.Event:2")


def _scalar(name: str, value: float, step: int) -> bytes:
    with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite
        simple_value = b"\x15" + np.asarray(value, "<f4").tobytes()
    value_of_tag = _bytes_field(1, name.encode()) + simple_value
    return _event(step) + _bytes_field(5, _bytes_field(1, value_of_tag))


def _event(step: int) -> bytes:
    """Returns the first fields of an event, the current time and a step."""
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step)


def _bytes_field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encodes a nonnegative integer, seven bits per byte, the lowest ones first."""
    encoded = []
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _checksum(data: bytes) -> bytes:
    """Returns the masked CRC-32C of the data."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (CRC32C_POLYNOMIAL if byte & 1 else 0)
    return byte


_CRC32C = [_crc_of(byte) for byte in range(256)]
