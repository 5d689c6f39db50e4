"""What a run tells: metrics.jsonl (the source of truth), TensorBoard, samples, the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

TRAIN, EVAL = "train", "eval"
PLAIN_LINES = 20  # progress lines of a run whose output is not a terminal


class RunLog:
    """Appends to the files of a run folder.

    Args:
      folder: the run folder.
      offsets: what `offsets()` returned at the checkpoint that is resumed from, None at the start;
        everything written since is cut off, so that no step appears twice.
      purge_from: first step whose TensorBoard points are to be forgotten.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, *, offsets: Mapping[str, int] | None, purge_from: int):
        from tensorboardX import SummaryWriter  # seconds to import

        self._files = {}
        for name in self.FILES:
            file = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            file.truncate(offsets[name] if offsets else 0)
            self._files[name] = file
        self._tensorboard = SummaryWriter(str(folder / "tb"), purge_step=purge_from)

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: `step`, `kind`, and the values (NaN and inf as null)."""
        self._write("metrics.jsonl", {"step": step, "kind": kind, **values})
        prefix = f"{values['split']}/" if "split" in values else ""
        for name, value in values.items():
            if not isinstance(value, str):
                self._tensorboard.add_scalar(prefix + name, value, step)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        for record in records:
            self._write("samples.jsonl", record)

    def offsets(self) -> dict[str, int]:
        """Lengths of the files in bytes, after forcing them to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._tensorboard.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        clean = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._files[name].write(json.dumps(clean, ensure_ascii=True, allow_nan=False) + "\n")
        self._files[name].flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Terminal:
    """Live progress on a terminal, plain lines elsewhere."""

    def __init__(self, num_steps: int, *, first_step: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[status]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "", total=num_steps, completed=first_step, status=""
            )

    def __enter__(self) -> "Terminal":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays. The text is shown as it is: no markup, no control characters."""
        self.console.print(Text(printable(text)))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (1 ..) has been done with these metrics."""
        status = (
            f"reward {values['reward/mean']:.2f}  guided {values['guidance/ratio_mean']:.2f}  "
            f"{values['time/tokens_per_sec']:,.0f} tokens/s"
        )
        if self._progress:
            self._progress.update(self._task, completed=step, status=status)
        elif step % max(1, self._num_steps // PLAIN_LINES) == 0 or step == self._num_steps:
            done = step - self._first_step
            left = (time.monotonic() - self._started) / done * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {status}  {left:.0f} s left", flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def printable(text: str) -> str:
    """The text without control characters: completions may hold terminal escapes."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    print(f"error: {printable(message)}", file=sys.stderr)
    return code
