"""Doing the runs of a comparison: a process each, side by side; what is finished is never repeated.

A run that was stopped is resumed by the trainer itself. A run that fails is kept, with its log, and tried again the
next time; the others go on.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trapo_jax.comparison.results import is_complete, progress
from trapo_jax.comparison.trials import Run
from trapo_jax.runs.directory import check_run_folder, write_atomically
from trapo_jax.types import UserError

LOOK_EVERY_SECS = 0.5
SAY_EVERY_SECS = 60.0
Say = Callable[[str], None]


class Failure(NamedTuple):
    """A run that ended otherwise than complete."""

    run: Run
    reason: str


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the runs at work have been saved."""


class _Job(NamedTuple):
    run: Run
    process: subprocess.Popen


def do_runs(
    runs: Sequence[Run], *, jobs: int, environment: Mapping[str, str], say: Say
) -> list[Failure]:
    """Does what is not complete yet, `jobs` at a time.

    Args:
      runs: in the order in which they are begun.
      jobs: processes at a time.
      environment: of the processes.
      say: takes a line of progress.

    Returns:
      The runs that failed.

    Raises:
      UserError: if a run's folder holds something else; before anything is begun.
      Interrupted: once the runs at work have been saved.
    """
    for run in runs:
        check_run_folder(run.folder, run.config.to_yaml())
    waiting = [run for run in runs if not is_complete(run)]
    active: list[_Job] = []
    failures: list[Failure] = []
    clock = _Clock(runs, say)
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_start(waiting.pop(0), environment))
            time.sleep(LOOK_EVERY_SECS)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                failed = _failure(job)
                failures += failed
                what = f"failed: {failed[0].reason}" if failed else "complete"
                clock.say(len(active), len(waiting), f"{job.run.name} {what}; ")
            clock.say_at_times(len(active), len(waiting))
    except KeyboardInterrupt:
        _stop(active)
        raise Interrupted from None
    except BaseException:  # such as a closed pipe: the runs at work are saved all the same
        _stop(active)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        for job in active:
            if job.process.poll() is None:
                job.process.kill()
    return failures


def log_file(run: Run) -> Path:
    """What the run's process printed; beside its folder, which is the trainer's alone."""
    return run.folder.with_name(run.folder.name + ".log")


def _start(run: Run, environment: Mapping[str, str]) -> _Job:
    config_file = run.folder.with_name(run.folder.name + ".yaml")
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config_file, run.config.to_yaml())
        with open(log_file(run), "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "trapo_jax.train", "--config", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                # Ctrl-C comes to the runs from here, once: a second signal would end them unsaved.
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"--out: {run.folder.parent}: {error.strerror}") from error
    return _Job(run, process)


def _failure(job: _Job) -> list[Failure]:
    """What went wrong with a run that has ended; nothing if it is complete."""
    if is_complete(job.run):
        return []
    lines = [line for line in log_file(job.run).read_text(errors="replace").splitlines() if line]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["it printed nothing"])[-1]
    reason = f"{last[:300]} (exit code {job.process.returncode}; {log_file(job.run)})"
    return [Failure(job.run, reason)]


def _stop(active: Sequence[_Job]) -> None:
    """Lets every run finish its step and save."""
    for job in active:
        job.process.send_signal(signal.SIGINT)
    for job in active:
        job.process.wait()


def _raise_interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt


class _Clock:
    """How much is done, how fast, and how long the rest takes at that rate."""

    def __init__(self, runs: Sequence[Run], say: Say):
        self._runs, self._say = runs, say
        self._started = self._last_said = time.monotonic()
        self._done_before = self._work_done()

    def _work_done(self) -> float:
        """In runs; those at work count by the share of their budget that is spent."""
        return sum(progress(run) for run in self._runs)

    def say_at_times(self, num_active: int, num_waiting: int) -> None:
        if time.monotonic() - self._last_said >= SAY_EVERY_SECS:
            self.say(num_active, num_waiting)

    def say(self, num_active: int, num_waiting: int, first: str = "") -> None:
        self._last_said = now = time.monotonic()
        done, hours = self._work_done(), (now - self._started) / 3600
        rate = (done - self._done_before) / hours
        pace = ""
        if rate > 0:
            pace = f"; {rate:.1f} runs an hour, {(len(self._runs) - done) / rate * 60:.0f} min left"
        complete = sum(map(is_complete, self._runs))
        self._say(
            f"{first}{complete} of {len(self._runs)} runs complete, {num_active} at work, "
            f"{num_waiting} waiting{pace}"
        )
