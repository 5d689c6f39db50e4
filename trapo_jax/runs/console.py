"""Terminal output of the commands: progress, messages and tables."""

import time
from collections.abc import Iterator, Mapping, Sequence

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

NUM_PLAIN_LINES = 20  # approximate number of progress lines if the output is not a terminal


class Console:
    """Shows live progress on a terminal, and prints plain lines otherwise.

    Args:
      num_steps: number of training steps, for the progress bar; 0 without one.
      first_step: number of steps completed before this process; 0 for a new run.
      quiet: whether to print nothing.
    """

    def __init__(self, num_steps: int = 0, *, first_step: int = 0, quiet: bool = False):
        self._rich = rich.console.Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._first_step = first_step
        self._started = time.monotonic()
        self._accuracy = ""
        self._progress: Progress | None = None
        if self._rich.is_terminal:
            self._progress = _Panel(
                TextColumn("training"),
                BarColumn(bar_width=32),
                TextColumn("{task.completed:.0f}/{task.total:.0f} "),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._rich,
            )
            self._task = self._progress.add_task(
                "", total=num_steps, completed=first_step, status=""
            )

    def __enter__(self) -> "Console":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a message above the progress bar, without interpreting markup or control characters."""
        self._rich.print(Text(printable(text)))

    def evaluated(self, split: str, accuracy: float) -> None:
        """Sets the accuracy that is shown with the progress: that of the latest evaluation."""
        self._accuracy = f"{split} accuracy {accuracy:.2f}  "

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the progress after a step.

        Args:
          step: number of the step, starting at 1.
          values: metrics of the step.
        """
        status = (
            f"reward {values['reward/mean']:.2f}  {self._accuracy}"
            f"guided {values['guidance/ratio_mean']:.2f}  "
            f"{values['time/tokens_per_sec']:,.0f} tokens/s"
        )
        # This is an estimate, because a budget may end the run before num_steps.
        total = max(step, round(step / values["budget/progress"]))
        if self._progress:
            self._progress.update(self._task, completed=step, total=total, status=status)
        elif step % max(1, total // NUM_PLAIN_LINES) == 0 or step == total:
            num_done = step - self._first_step
            secs_left = (time.monotonic() - self._started) / num_done * (total - step)
            self.say(f"step {step}/{total}  {status}  {secs_left:.0f} s left")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table. Cells are escaped as in `say`, because they may contain names from the data."""
        self.say(title)  # A title of the table would be wrapped at its width.
        table = Table()
        for i, name in enumerate(header):
            table.add_column(Text(printable(name)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._rich.print(table)


class _Panel(Progress):
    """A progress bar with the status on a line below it, so that it fits into 80 columns."""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (task.fields["status"] for task in self.tasks)


def printable(text: str, *, keep: str = "") -> str:
    """Replaces unprintable characters with Python escapes, because text may contain terminal control sequences.

    Args:
      text: any text.
      keep: characters to leave unescaped.

    >>> printable("\\x1b[31mred\\nstep 9: accuracy 1.000")
    '\\\\x1b[31mred\\\\nstep 9: accuracy 1.000'
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """Returns the Python escape of a character; lone surrogates are supported."""
    return character.encode("unicode_escape").decode()
