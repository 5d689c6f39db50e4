"""What a run notices: signs that it learns nothing or samples wrongly, a full disk, a stuck step, a wish that it stop."""

import faulthandler
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from trapo_jax.types import TrainingFailed

EXIT_TRAINING_FAILED = 1
WARN_AFTER_STEPS = 20  # in a row, without a training signal or with every completion truncated


class Health:
    """Looks at every step's metrics.

    Args:
      max_logprob_gap: limit on the mean difference of the sampler's and the trainer's log-probabilities.
      max_skipped_steps: so many updates in a row without effect end the run.
    """

    def __init__(self, *, max_logprob_gap: float, max_skipped_steps: int):
        self._max_logprob_gap = max_logprob_gap
        self._max_skipped_steps = max_skipped_steps
        self._in_a_row = {"truncated": 0, "no signal": 0}

    def observe(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings about a step, one line each.

        Raises:
          TrainingFailed: if the run should not go on.
        """
        warnings = []
        if values["optimizer/skipped"]:
            why = _why_skipped(values)
            warnings.append(f"step {step}: no update was made, as {why}")
            if values["optimizer/skipped_in_a_row"] >= self._max_skipped_steps:
                raise TrainingFailed(
                    f"step {step}: {why}, and so for "
                    f"train.max_skipped_steps={self._max_skipped_steps} updates in a row; lower "
                    "train.learning_rate"
                )
        if (gap := values["policy/logprob_gap_mean"]) > self._max_logprob_gap:
            why = "the rewards do not belong to the policy that is trained"
            if num_stale := values["sampling/stale_tokens"]:
                why = (
                    f"{num_stale:.0f} tokens were drawn before the last update: give sampling.max_staleness=0 or a "
                    "lower train.learning_rate"
                )
            raise TrainingFailed(
                f"step {step}: sampler and trainer differ by {gap:.3g} in the mean log-probability of "
                f"a token, more than limits.max_logprob_gap={self._max_logprob_gap}; {why}"
            )
        if values["batch/completion_tokens"]:
            warnings += self._count(
                step,
                "truncated",
                values["completion/truncated"] == 1,
                "every completion was cut off at sampling.max_completion_length",
            )
            warnings += self._count(
                step,
                "no signal",
                values["reward/groups_with_signal"] == 0,
                "all rewards of a problem were equal, for every problem: the policy gradient is zero",
            )
        return warnings

    def _count(self, step: int, name: str, is_so: bool, text: str) -> list[str]:
        """Counts the steps in a row, and warns once that there are enough of them."""
        self._in_a_row[name] = self._in_a_row[name] + 1 if is_so else 0
        if self._in_a_row[name] != WARN_AFTER_STEPS:
            return []
        return [f"step {step}: for {WARN_AFTER_STEPS} steps {text}"]


def _why_skipped(values: Mapping[str, float]) -> str:
    """The terms that were not finite, or the gradient if all were, or a gradient that the method will not apply."""
    names = [name for name in values if name.startswith("loss/") and name != "loss/total"]
    if terms := [name for name in names if not math.isfinite(values[name])]:
        return f"{' and '.join(terms)} was not finite"
    norm = values["optimizer/grad_norm"]
    if not math.isfinite(norm):
        return "the gradient was not finite"
    return f"the gradient's norm of {norm:.3g} is more than the method applies"


class Watchdog:
    """Ends the process if nothing happens for too long, with a dump of every thread's stack.

    On several hosts this ends the processes that wait for one that died or hangs.

    Args:
      limit_secs: between two calls of `beat`.
    """

    def __init__(self, limit_secs: float):
        self._limit_secs = limit_secs
        self._closed = threading.Event()
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Something has happened; `doing` is what comes now."""
        self._last = (time.monotonic(), doing)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_secs / 4)):
            since, doing = self._last
            if time.monotonic() - since > self._limit_secs:
                print(
                    f"error: nothing has happened for limits.stuck_after_secs={self._limit_secs:g} "
                    f"seconds while {doing}, maybe because another process died; where this one stands:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_TRAINING_FAILED)


class Interrupt:
    """SIGINT and SIGTERM let the step finish; a second one ends the process at once."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = False
        self._before = {number: signal.signal(number, self._receive) for number in self.NUMBERS}

    def close(self) -> None:
        """Puts back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *_) -> None:
        self.received = True
        for number in self.NUMBERS:  # by the kernel: Python would first let a compiled program end
            signal.signal(number, signal.SIG_DFL)
        print("finishing this step, then saving; once more to stop at once", file=sys.stderr)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Stops before a write that the disk has no room for.

    Raises:
      TrainingFailed: naming the folder and how much is left.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise TrainingFailed(
            f"output_dir={folder}: {free / 2**20:.1f} MiB left on the disk, {what} needs "
            f"{needed_bytes / 2**20:.1f}; make room, and the same command resumes from the last checkpoint"
        )
