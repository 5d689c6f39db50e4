"""Terminal output of the commands: progress, messages and tables."""

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trapo_jax.printable import printable
from trapo_jax.runs.loggers import describe_samples
from trapo_jax.runs.progress import MIN_SECS, Activity, LinePacer, describe_secs
from trapo_jax.runs.system_errors import OUTPUT, leave_lost_terminal
from trapo_jax.types import SamplingProgress

NUM_PLAIN_LINES = 20  # approximate number of progress lines if the output is not a terminal


class Console:
    """Shows live progress on a terminal, and prints plain lines otherwise.

    Args:
      num_steps: number of training steps, for the progress bar; 0 without one.
      first_step: number of steps completed before this process; 0 for a new run.
      quiet: whether to print nothing.
      clock: returns the time in seconds.
    """

    def __init__(
        self,
        num_steps: int = 0,
        *,
        first_step: int = 0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rich = rich.console.Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._clock = clock
        self._last_step_line = clock()
        self._first_step: tuple[int, float] | None = None  # and the time at which it was complete
        self._activity: Activity | None = None
        self._pacer = LinePacer()
        self._panel: _Panel | None = None
        if self._rich.is_terminal and num_steps:
            self._panel = _Panel(
                TextColumn("training"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f} "),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[rate]}"),
                console=self._rich,
            )
            self._task = self._panel.add_task("", total=num_steps, completed=first_step, rate="")

    def __enter__(self) -> "Console":
        if self._panel:
            self._panel.start()
        return self

    def __exit__(self, *_) -> None:
        if self._panel:
            self._write(self._panel.stop)

    def say(self, text: str) -> None:
        """Prints a message above the progress bar, without interpreting markup or control characters."""
        self._write(lambda: self._rich.print(Text(printable(text))))

    def _write(self, write: Callable[[], None]) -> None:
        """Calls a function that writes to standard output. Without its terminal, the program continues silently."""
        try:
            write()
        except OSError as error:
            if error.errno != errno.EIO:
                error.filename = OUTPUT
                raise
            leave_lost_terminal()

    def begin(self, name: str, num_samples: int = 0) -> None:
        """Shows what the program does next.

        Args:
          name: such as "evaluating test".
          num_samples: number of completions to sample and grade for it; 0 if nothing is sampled.
        """
        self._activity = Activity(name, num_samples, self._clock())
        if not num_samples:  # Otherwise, the first report follows at once.
            self._show_activity()

    def advance(self, progress: SamplingProgress) -> None:
        """Shows how far the current activity is."""
        if self._activity:
            self._activity.advance(progress)
            self._show_activity()

    def set_compiling(self, is_compiling: bool) -> None:
        """Shows whether the current activity waits for a compilation."""
        if self._activity:
            self._activity.set_compiling(is_compiling, self._clock())
            self._show_activity()

    def _show_activity(self) -> None:
        assert self._activity
        now = self._clock()
        text = self._activity.describe(now)
        if self._panel:
            self._panel.show(activity=text)
        elif self._pacer.is_due(self._activity, now):
            self._pacer.record_line(now, self._activity)
            self.say(text)

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Prints the scores of an evaluation, and keeps its accuracy in the panel.

        Args:
          step: number of completed steps.
          split: the split that was evaluated.
          metrics: `eval/...` metrics by name.
        """
        accuracy, num_samples = metrics["eval/accuracy_sampled"], metrics["eval/num_samples"]
        mean = metrics.get("eval/accuracy_sampled_mean_of_sources")
        if self._panel:
            self._panel.show(evaluation=f"after step {step}: {split} accuracy {accuracy:.2f}")
        pass_at_n = f", pass@{num_samples} {metrics[f'eval/pass@{num_samples}']:.3f}"
        self.say(
            f"step {step}: {split} split, {metrics['eval/num_problems']} problems: greedy accuracy "
            f"{metrics['eval/accuracy_greedy']:.3f} (1 sample each), sampled {accuracy:.3f}"
            f"{pass_at_n if num_samples > 1 else ''}{'' if mean is None else f', mean of sources {mean:.3f}'} "
            f"({describe_samples(metrics)})"
        )

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the progress after a step.

        Args:
          step: number of the step, starting at 1.
          values: metrics of the step.
        """
        status = _describe_step(values)
        # This is an estimate, because a budget may end the run before num_steps.
        total = max(step, round(step / values["budget/progress"]))
        now = self._clock()
        if self._panel:
            rate = f"{values['time/tokens_per_sec']:,.0f} tokens/s"
            self._panel.update(self._task, completed=step, total=total, rate=rate)
            self._panel.show(status=status)
        elif (
            step % max(1, total // NUM_PLAIN_LINES) == 0
            or step == total
            or now - self._last_step_line >= MIN_SECS
        ):
            self._last_step_line = now
            self._pacer.record_line(now)
            self.say(f"step {step}/{total}  {status}{self._time_left(step, total, now)}")
        self._first_step = self._first_step or (step, now)

    def _time_left(self, step: int, total: int, now: float) -> str:
        """Returns the time that the remaining steps take if they are as fast as those after the first."""
        if self._first_step is None:
            return ""
        first, started = self._first_step
        secs_left = (now - started) / (step - first) * (total - step)
        return f"  {describe_secs(secs_left)} left"

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table. Cells are escaped as in `say`, because they may contain names from the data."""
        self.say(title)  # A title of the table would be wrapped at its width.
        table = Table()
        for i, name in enumerate(header):
            table.add_column(Text(printable(name)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._write(lambda: self._rich.print(table))


def _describe_step(values: Mapping[str, float]) -> str:
    """Returns the loss of a step, and the mean reward of its sampled rollouts, of which some may be guided."""
    parts = [f"loss {values['loss/total']:.3f}"]
    if "reward/sampled_mean" in values:
        reward = f"reward {values['reward/sampled_mean']:.2f}"
        if values["guidance/ratio_mean"] > 0 and "reward/unguided_mean" in values:
            reward += f" (unguided {values['reward/unguided_mean']:.2f})"
        parts.append(reward)
    parts.append(f"guided {values['guidance/ratio_mean']:.2f}")
    if values["completion/len_mean"]:
        parts.append(f"length {values['completion/len_mean']:,.0f}")
    return "  ".join(parts)


class _Panel(Progress):
    """A progress bar with lines of text below it, so that it fits into 80 columns."""

    def __init__(self, *columns: ProgressColumn, console: rich.console.Console):
        self._lines = dict.fromkeys(("status", "evaluation", "activity"), "")
        super().__init__(*columns, console=console)

    def show(self, **lines: str) -> None:
        """Replaces lines by name: `status`, `evaluation` or `activity`."""
        self._lines |= lines

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(printable(line)) for line in self._lines.values() if line)
