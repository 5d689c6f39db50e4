"""Prints the progress, messages and tables of the commands."""

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from trapo_jax.inputs.printable import printable
from trapo_jax.runs.loggers import describe_samples
from trapo_jax.runs.progress import (
    MIN_SECS,
    Activity,
    LinePacer,
    RunEstimate,
    counted,
    describe_secs,
)
from trapo_jax.runs.system_errors import OUTPUT, leave_lost_terminal
from trapo_jax.types import SamplingProgress

UNLIMITED_WIDTH = 10_000
TICK_SECS = 1.0
NUM_PLAIN_LINES = 20  # Approximate number of progress lines if the output is not a terminal.


class Console:
    """Shows live progress on a terminal, and prints plain lines otherwise.

    Args:
      num_steps: number of training steps, for the progress bar; 0 to show no progress bar.
      first_step: number of steps completed before this process started; 0 for a new run.
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
        if not self._rich.is_terminal:
            self._rich.width = UNLIMITED_WIDTH  # Tables are neither truncated nor wrapped.
        self._clock = clock
        self._last_step_line = clock()
        self._estimate = RunEstimate()
        self._compiling_since: float | None = None
        self._activity: Activity | None = None
        self._kind = ""  # the activity's name without the step
        self._durations: dict[str, float] = {}  # in seconds, of the last activity of each kind
        self._pacer = LinePacer()
        self._lock = threading.RLock()  # Guards the state of the activity.
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None
        self._panel: _Panel | None = None
        if self._rich.is_terminal and num_steps:
            self._panel = _Panel(
                TextColumn("training"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f} "),
                TextColumn("{task.fields[left]}  {task.fields[rate]}"),
                console=self._rich,
            )
            self._task = self._panel.add_task(
                "", total=num_steps, completed=first_step, left="", rate=""
            )

    def __enter__(self) -> "Console":
        if self._panel:
            self._panel.start()
        if not self._rich.quiet:
            self._ticker = threading.Thread(
                target=self._tick_until_closed, name="console", daemon=True
            )
            self._ticker.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._ticker:
            self._ticker.join()
        if self._panel:
            self._write(self._panel.stop)

    def _tick_until_closed(self) -> None:
        while not self._closed.wait(TICK_SECS):
            self.tick()

    def tick(self) -> None:
        """Shows that an activity is still running while it reports no progress. Called every `TICK_SECS`."""
        with self._lock:
            if self._activity and (self._activity.is_silent or self._activity.is_compiling):
                self._show_activity()

    def say(self, text: str) -> None:
        """Prints a message above the progress bar, without interpreting markup or control characters."""
        self._write(lambda: self._rich.print(Text(printable(text))))

    def _write(self, write: Callable[[], None]) -> None:
        """Calls a function that writes to standard output. If the terminal is gone, the program continues silently."""
        try:
            write()
        except OSError as error:
            if error.errno != errno.EIO:
                error.filename = OUTPUT
                raise
            leave_lost_terminal()

    def begin(self, name: str, num_samples: int = 0, what: str = "") -> None:
        """Shows which activity the program is starting.

        Args:
          name: name of the activity, such as "evaluating test".
          num_samples: number of completions to sample and grade; 0 if nothing is sampled.
          what: description of these completions; see `Activity`.
        """
        now, kind = (
            self._clock(),
            name.rpartition(": ")[2],
        )  # Names of training activities start with the step.
        with self._lock:
            self._end_activity()
            self._kind = kind
            self._activity = Activity(name, num_samples, now, what, self._durations.get(kind, 0.0))
            if not num_samples:  # With samples, a progress report follows immediately.
                self._show_activity()

    def _end_activity(self) -> None:
        """Records how long an activity without sampling took, as an estimate for the next one of its kind."""
        if self._activity and self._activity.is_silent:
            self._durations[self._kind] = self._activity.secs(self._clock())
        self._activity = None

    def advance(self, progress: SamplingProgress) -> None:
        """Shows the progress of the current activity."""
        with self._lock:
            if self._activity:
                self._activity.advance(progress)
                self._show_activity()

    def set_compiling(self, is_compiling: bool) -> None:
        """Shows whether the current activity is waiting for a compilation."""
        now = self._clock()
        with self._lock:
            if self._compiling_since is not None:
                self._estimate.add_compilation(now, now - self._compiling_since)
            self._compiling_since = now if is_compiling else None
            if self._activity:
                self._activity.set_compiling(is_compiling, now)
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
        """Prints the scores of an evaluation and shows its accuracy in the panel.

        Args:
          step: number of completed steps.
          split: the split that was evaluated.
          metrics: `eval/...` metrics, keyed by name.
        """
        if step == 0 and self._activity:  # The evaluation will be repeated after the last step.
            self._estimate.add_final_evaluation(self._activity.secs(self._clock()))
        accuracy, num_samples = metrics["eval/accuracy_sampled"], metrics["eval/num_samples"]
        mean = metrics.get("eval/accuracy_sampled_mean_of_sources")
        if self._panel:
            self._panel.show(evaluation=f"after step {step}: {split} accuracy {accuracy:.2f}")
        pass_at_n = f", pass@{num_samples} {metrics[f'eval/pass@{num_samples}']:.3f}"
        no_answer = (
            f", no answer {metrics['eval/no_answer']:.3f}" if "eval/no_answer" in metrics else ""
        )
        self.say(
            f"step {step}: {split} split, {counted(metrics['eval/num_problems'], 'problem')}: greedy accuracy "
            f"{metrics['eval/accuracy_greedy']:.3f} (1 sample each), sampled {accuracy:.3f}"
            f"{pass_at_n if num_samples > 1 else ''}{'' if mean is None else f', mean of sources {mean:.3f}'} "
            f"({describe_samples(metrics)}){no_answer}"
        )

    def step(self, step: int, values: Mapping[str, float], *, secs: float) -> None:
        """Shows the progress after a step.

        Args:
          step: number of the step, starting at 1.
          values: metrics of the step.
          secs: duration of the step.
        """
        status = _describe_step(values)
        # The total is an estimate, because a budget may end the run before num_steps.
        total = max(step, round(step / values["budget/progress"]))
        now = self._clock()
        left = (
            f"{describe_secs(self._estimate.secs_left(step, total, step_secs=secs, now=now))} left"
        )
        if self._panel:
            rate = f"{values['time/tokens_per_sec']:,.0f} tokens/s"
            self._panel.update(self._task, completed=step, total=total, left=left, rate=rate)
            self._panel.show(status=status)
        elif (
            step % max(1, total // NUM_PLAIN_LINES) == 0
            or step == total
            or now - self._last_step_line >= MIN_SECS
        ):
            self._last_step_line = now
            with self._lock:
                self._pacer.record_line(now)
            self.say(f"step {step}/{total}  {status}  {left}")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table. Cells are escaped as in `say`, because they may contain names from the data."""
        self.say(title)  # Rich would wrap a table title at the table's width.
        table = Table()
        for i, name in enumerate(header):
            justify = "left" if i == 0 else "right"
            table.add_column(Text(printable(name)), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._write(lambda: self._rich.print(table))


def table_width(console: rich.console.Console) -> int:
    """Returns the maximum width of tables, which is unlimited if the output is not a terminal."""
    return console.width if console.is_terminal else UNLIMITED_WIDTH


def _describe_step(values: Mapping[str, float]) -> str:
    """Describes a step: its loss, the reward and length of its sampled rollouts, and how much they were guided."""
    parts = [f"loss {values['loss/total']:.3f}"]
    ratio, max_ratio = values["guidance/ratio_mean"], values["guidance/ratio_max"]
    if "reward/sampled_mean" in values:
        parts.append(f"reward {_describe_reward(values, 'sampled')}")
        if ratio > 0 and "reward/unguided_mean" in values:
            parts[-1] += f" (unguided {_describe_reward(values, 'unguided')})"
    if values["completion/len_mean"]:
        if max_ratio > 0:
            parts.append(f"guided {ratio:.2f}/{max_ratio:.2f}")
        parts.append(f"length {values['completion/len_mean']:,.0f}")
    return "  ".join(parts)


def _describe_reward(values: Mapping[str, float], which: str) -> str:
    """Returns the number of correct rollouts if every reward of the step is 0 or 1, otherwise the mean reward."""
    mean, number = values[f"reward/{which}_mean"], values[f"reward/num_{which}"]
    total = values["reward/sampled_mean"] * values["reward/num_sampled"]
    is_binary = math.isclose(total, values["reward/num_right"], abs_tol=1e-6)
    return f"{mean * number:.0f}/{number:.0f}" if is_binary else f"{mean:.2f}"


class _Panel(Progress):
    """A progress bar with lines of text below it, so that the panel fits in 80 columns."""

    def __init__(self, *columns: ProgressColumn, console: rich.console.Console):
        self._lines = dict.fromkeys(("status", "evaluation", "activity"), "")
        super().__init__(*columns, console=console)

    def show(self, **lines: str) -> None:
        """Replaces the named lines: `status`, `evaluation` or `activity`."""
        self._lines |= lines

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(printable(line)) for line in self._lines.values() if line)
