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

from trapo_jax.types import UserError

TRAIN, EVAL = "train", "eval"
TENSORBOARD = "tb"
PLAIN_LINES = 20  # progress lines of a run whose output is not a terminal


class RunLog:
    """Appends to the files of a run folder.

    Args:
      folder: the run folder.
      offsets: what `offsets()` returned at the checkpoint that is resumed from, None at the start;
        everything written since is cut off, TensorBoard's files included, so that no step appears twice.

    Raises:
      UserError: if a file is shorter than it was at the checkpoint.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, *, offsets: Mapping[str, int] | None):
        from tensorboardX import SummaryWriter  # seconds to import

        self._folder = folder
        offsets = offsets or dict.fromkeys(self.FILES, 0)
        _cut(folder, offsets, self.FILES)
        self._files = {
            name: open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            for name in self.FILES
        }
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD))

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
        """Lengths of the files in bytes, by path in the folder, after forcing them to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._tensorboard.flush()
        paths = [*(self._folder / name for name in self._files), *_event_files(self._folder)]
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._tensorboard.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        clean = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._files[name].write(json.dumps(clean, ensure_ascii=True, allow_nan=False) + "\n")
        self._files[name].flush()


class NoLog(RunLog):
    """Of the processes that write nothing."""

    def __init__(self):
        pass

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        pass

    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def _cut(folder: Path, offsets: Mapping[str, int], needed: Sequence[str]) -> None:
    """Cuts the files of a log at `offsets`, and removes the event files that were not there then."""
    paths = {path.relative_to(folder).as_posix(): path for path in _event_files(folder)}
    paths |= {name: folder / name for name in needed}
    for name, path in paths.items():
        length = path.stat().st_size if path.exists() else 0
        if name not in offsets:
            path.unlink()
        elif length > offsets[name]:
            os.truncate(path, offsets[name])
        elif length < offsets[name] and name in needed:
            raise UserError(
                f"{path}: {length} bytes, but it had {offsets[name]} at the checkpoint; put it back, or "
                "give another output_dir"
            )


def _event_files(folder: Path) -> list[Path]:
    return sorted((folder / TENSORBOARD).glob("events.*"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Terminal:
    """Live progress on a terminal, plain lines elsewhere; a quiet one says nothing."""

    def __init__(self, num_steps: int, *, first_step: int, quiet: bool = False):
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
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
        # So many steps it will have been, as far as one can tell: a budget may end the run before num_steps.
        total = max(step, round(step / values["budget/progress"]))
        if self._progress:
            self._progress.update(self._task, completed=step, total=total, status=status)
        elif step % max(1, total // PLAIN_LINES) == 0 or step == total:
            done = step - self._first_step
            left = (time.monotonic() - self._started) / done * (total - step)
            self.say(f"step {step}/{total}  {status}  {left:.0f} s left")

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
