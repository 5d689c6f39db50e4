"""What a run tells: metrics.jsonl (the source of truth), TensorBoard, samples, the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trapo_jax.types import UserError

TRAIN, EVAL = "train", "eval"
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE
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
                self._tensorboard.add_scalar(printable(prefix + name), value, step)

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
        text = json.dumps(_finite(record), ensure_ascii=True, allow_nan=False)
        self._files[name].write(text + "\n")
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
    return list(read_records(folder / "metrics.jsonl"))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file, but for a last one that is still being written.

    Raises:
      UserError: naming the line that is none.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not a JSON record") from error


def _finite(value: Any) -> Any:
    """The same with null for NaN and inf, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Panel(Progress):
    """The bar, and under it, so that 80 columns suffice, how things stand."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (task.fields["status"] for task in self.tasks)


class Terminal:
    """Live progress on a terminal, plain lines elsewhere; a quiet one says nothing."""

    def __init__(self, num_steps: int, *, first_step: int, quiet: bool = False):
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._first_step = first_step
        self._started = time.monotonic()
        self._accuracy: float | None = None
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = _Panel(
                TextColumn("training"),
                BarColumn(bar_width=32),
                TextColumn("{task.completed:.0f}/{task.total:.0f} "),
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

    def evaluated(self, accuracy: float) -> None:
        """The last evaluation found this; shown from now on."""
        self._accuracy = accuracy

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (1 ..) has been done with these metrics."""
        accuracy = "" if self._accuracy is None else f"accuracy {self._accuracy:.2f}  "
        status = (
            f"reward {values['reward/mean']:.2f}  {accuracy}"
            f"guided {values['guidance/ratio_mean']:.2f}  "
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
        """A table that stays; names of sources stand in it, so its texts are shown as `say` does."""
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(Text(printable(name)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)


def printable(text: str, *, keep: str = "") -> str:
    """The text with all that does not print spelled out: completions may hold terminal escapes, new lines and such.

    >>> printable("\\x1b[31mred\\nstep 9: accuracy 1.000")
    '\\\\x1b[31mred\\\\nstep 9: accuracy 1.000'
    """
    return "".join(c if c.isprintable() or c in keep else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    """As Python spells it; lone surrogates, control and format characters among others."""
    return character.encode("unicode_escape").decode()


def as_command(main: Callable[[], int]) -> NoReturn:
    """Ends the process as `main` says; without a traceback, too, where Ctrl-C or a closed pipe (`| head`) ends it."""
    try:
        try:
            code = main()
        except SystemExit as end:  # of argparse
            code = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = fail("stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush
        code = EXIT_BROKEN_PIPE
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Prints an error to standard error and returns the exit code."""
    print("error:", printable(message, keep="\n"), file=sys.stderr)  # a line for each mistake
    return code
