"""Writes TensorBoard events synchronously. A failure to write them causes only a warning.

`tensorboardX.SummaryWriter` writes from a thread. If that thread dies (for example because the disk is full or the
clock is set back), its queue fills up and the next scalar blocks forever. The events only duplicate metrics.jsonl, so
failures to write them are not fatal.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EVENTS = "events"  # Prefix of event file names.


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch from tensorboardX, which otherwise imports it to accept tensors; this import takes seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  makes `import torch` fail
    try:
        yield
    finally:
        del sys.modules["torch"]


class TensorBoard:
    """Writes scalars to an event file. After the first failure, prints a warning and discards all further scalars.

    Args:
      folder: the directory for event files; created if it does not exist.
      run_id: id of the run, used in the names of its event files.
    """

    def __init__(self, folder: Path, run_id: str):
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        self._folder = folder
        self._summary, self._event = summary.scalar, event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self._writer: Any = None
        try:
            folder.mkdir(exist_ok=True)
            # File names contain the start time in seconds. The process id tells apart processes that start in the same
            # second.
            self._writer = event_file_writer.EventsWriter(
                str(folder / f"{EVENTS}.{run_id}"), filename_suffix=f".{os.getpid()}"
            )
        except OSError as error:
            self._disable(error)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes a scalar."""
        if self._writer is None:
            return
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(name, value))
        self._call(lambda writer: writer.write_event(event))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes the scalars of a step."""
        for name, value in values.items():
            self.scalar(name, value, step)

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Does nothing; the report shows samples."""

    def flush(self) -> None:
        """Flushes the events to disk."""
        self._call(lambda writer: writer.flush())

    def close(self) -> None:
        self._call(lambda writer: writer.close())
        self._writer = None

    def _call(self, function: Any) -> None:
        if self._writer is None:
            return
        try:
            function(self._writer)
        except (OSError, ValueError) as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self._writer = None
        print(
            f"warning: {self._folder}: no more TensorBoard events will be written "
            f"({getattr(error, 'strerror', error)}); metrics.jsonl contains the same values",
            file=sys.stderr,
        )


def event_files(folder: Path, run_id: str) -> list[Path]:
    """Returns the event files that a run wrote to a directory; empty if the directory does not exist."""
    name = re.compile(rf"{EVENTS}\.{re.escape(run_id)}\.out\.tfevents\.\d+\..+\.\d+")
    return sorted(path for path in folder.glob(f"{EVENTS}.*") if name.fullmatch(path.name))
