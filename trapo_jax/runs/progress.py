"""Describes the progress of an evaluation or a step: its current phase, sample count, rate and time left."""

from trapo_jax.types import SamplingProgress

# Minimum time between lines of plain output: MIN_SECS, or MAX_SECS while the share of graded samples has grown by less
# than MIN_SHARE since the last line.
MIN_SECS, MAX_SECS, MIN_SHARE = 10.0, 30.0, 0.05
# The time left is estimated once this share or this number of samples, whichever is smaller, has been graded. Before
# that, the estimate would be too low, because the samples that are graded first are the shortest.
MIN_GRADED_SHARE, MIN_GRADED = 0.25, 64


class Activity:
    """An operation that takes a while, such as an evaluation.

    Args:
      name: name of the activity, such as "evaluating test".
      num_samples: number of completions to sample and grade; 0 for an activity without sampling.
      now: the current time in seconds.
      what: description of these samples, shown until the first one is graded; empty to show their number instead.
      expected_secs: expected duration of an activity without sampling; 0 if unknown.
    """

    def __init__(
        self,
        name: str,
        num_samples: int,
        now: float,
        what: str = "",
        expected_secs: float = 0.0,
    ):
        self._name, self._num_samples, self._what = name, num_samples, what
        self._expected_secs = expected_secs
        self._phase = "starting" if num_samples else ""
        self._num_graded = self._num_sampled_tokens = self._num_prefilled_tokens = 0
        self._started = now
        self._compiling_since: float | None = None
        self._compile_secs = 0.0

    def advance(self, progress: SamplingProgress) -> None:
        """Adds the samples and tokens processed since the last call."""
        self._phase = progress.phase
        self._num_graded += progress.num_graded
        self._num_sampled_tokens += progress.num_sampled_tokens
        self._num_prefilled_tokens += progress.num_prefilled_tokens

    def set_compiling(self, is_compiling: bool, now: float) -> None:
        """Records that the program has started or stopped waiting for a compilation."""
        if self._compiling_since is not None:
            self._compile_secs += now - self._compiling_since
        self._compiling_since = now if is_compiling else None

    @property
    def share(self) -> float:
        """Share of samples that have been graded."""
        return min(1.0, self._num_graded / max(1, self._num_samples))

    @property
    def is_silent(self) -> bool:
        """Whether the activity reports no progress."""
        return not self._num_samples

    @property
    def is_compiling(self) -> bool:
        """Whether the program is waiting for a compilation."""
        return self._compiling_since is not None

    def elapsed_secs(self, now: float) -> float:
        """Returns the duration of the activity so far, including compilation."""
        return now - self._started

    def secs(self, now: float) -> float:
        """Returns the duration of the activity so far, excluding completed compilations."""
        return self.elapsed_secs(now) - self._compile_secs

    def describe(self, now: float) -> str:
        """Returns a one-line description. Rates and the time left exclude compilation time."""
        phase = self._phase if self._compiling_since is None else "compiling"
        details = [phase] if phase not in ("", "sampling") else []
        compile_secs = now - (self._compiling_since or now)
        if self._num_samples and compile_secs >= MIN_SECS:
            details = [f"compiling for {describe_secs(compile_secs)}"]
        if self._num_samples:
            details += self._describe_samples(phase, self.secs(now))
        elif self.elapsed_secs(now) >= MIN_SECS:
            secs = describe_secs(self.elapsed_secs(now))
            is_known = self._expected_secs and phase != "compiling"
            details.append(
                f"{secs} of about {describe_secs(self._expected_secs)}" if is_known else secs
            )
        return f"{self._name}: {', '.join(details)}" if details else self._name

    def _describe_samples(self, phase: str, secs: float) -> list[str]:
        details = []
        num_samples, num_graded = self._num_samples, min(self._num_graded, self._num_samples)
        if phase == "prefilling" and self._num_prefilled_tokens:
            details.append(f"{self._num_prefilled_tokens:,} tokens")
        count = f"{num_graded:,} of {num_samples:,} samples"
        details.append(self._what if self._what and not num_graded else count)
        if phase == "sampling" and secs > 0:
            details.append(f"{self._num_sampled_tokens / secs:,.0f} tokens/s")
        is_known = num_graded >= min(MIN_GRADED_SHARE * num_samples, MIN_GRADED)
        if phase in ("sampling", "grading") and num_graded and is_known:
            details.append(f"{describe_secs(secs / num_graded * (num_samples - num_graded))} left")
        return details


class RunEstimate:
    """Estimates a run's remaining time from the steps so far, excluding compilation."""

    def __init__(self):
        # The number of completed steps and the time when the first observed step began.
        self._first: tuple[int, float] | None = None
        self._compilations: list[tuple[float, float]] = []  # End and duration of each compilation.
        self._final_secs = 0.0

    def add_compilation(self, now: float, secs: float) -> None:
        """Adds a completed compilation."""
        self._compilations.append((now, secs))

    def add_final_evaluation(self, secs: float) -> None:
        """Adds the duration of an evaluation that will be repeated after the last step."""
        self._final_secs += secs

    def secs_left(self, step: int, total: int, *, step_secs: float, now: float) -> float:
        """Returns the time left after a step.

        Args:
          step: number of the completed step.
          total: number of steps in the run.
          step_secs: duration of this step.
          now: the current time in seconds.
        """
        self._first = self._first or (step - 1, now - step_secs)
        first, started = self._first
        compile_secs = sum(secs for end, secs in self._compilations if end > started)
        per_step = max(0.0, now - started - compile_secs) / (step - first)
        return per_step * (total - step) + self._final_secs


class LinePacer:
    """Decides when to print a line of plain output: the first immediately, later lines at a rate suitable for a log."""

    def __init__(self):
        self._last = float("-inf")
        self._described: tuple[Activity | None, float] = (None, 0.0)

    def is_due(self, activity: Activity, now: float) -> bool:
        described, share = self._described
        if activity.is_silent:  # Lines become less frequent over time.
            return now - self._last >= max(MIN_SECS, activity.elapsed_secs(now) / 3)
        has_advanced = activity is not described or activity.share >= share + MIN_SHARE
        return now - self._last >= (MIN_SECS if has_advanced else MAX_SECS)

    def record_line(self, now: float, activity: Activity | None = None) -> None:
        """Records that a line was printed, either about `activity` or about something else."""
        self._last = now
        if activity is not None:
            self._described = (activity, activity.share)


def counted(number: float, noun: str) -> str:
    """Returns a number followed by a noun in the singular or plural.

    >>> counted(1, "sample"), counted(2000, "sample")
    ('1 sample', '2,000 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_secs(secs: float) -> str:
    """Formats a duration as a whole number of seconds, minutes or hours.

    >>> [describe_secs(s) for s in (95.4, 250, 30_000)]
    ['95 s', '4 min', '8 h']
    """
    if secs < 120:
        return f"{secs:.0f} s"
    if secs < 120 * 60:
        return f"{secs / 60:.0f} min"
    return f"{secs / 3600:.0f} h"
