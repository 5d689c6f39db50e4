"""Executes the runs of a comparison concurrently, each in a separate process.

Completed runs are skipped, and interrupted runs are resumed by `trapo_jax.train`. The record of a run is written when
the run is complete. A run that fails does not stop the others; its directory and log are kept, and it is retried when
the comparison is repeated.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trapo_jax.comparison.grid import PlannedRun
from trapo_jax.comparison.records import collect_result, is_done
from trapo_jax.comparison.results import progress
from trapo_jax.runs.directory import write_atomically
from trapo_jax.runs.resuming import check_run_folder
from trapo_jax.types import Interrupted, UserError

POLL_SECS = 0.5
REPORT_SECS = 60.0
Say = Callable[[str], None]


class Failure(NamedTuple):
    """A run that ended before it was complete."""

    run: PlannedRun
    reason: str


class _Job(NamedTuple):
    run: PlannedRun
    process: subprocess.Popen


def execute_runs(
    runs: Sequence[PlannedRun], *, jobs: int, environment: Mapping[str, str], say: Say
) -> list[Failure]:
    """Executes the runs that are not yet complete.

    Args:
      runs: runs in the order in which to start them.
      jobs: maximum number of concurrent processes.
      environment: environment variables of the processes.
      say: function that prints a line about the progress.

    Returns:
      The runs that failed.

    Raises:
      UserError: if a run's directory contains a different run or other files. In this case, no run has been started.
      Interrupted: if the comparison is interrupted; raised after the active runs have saved checkpoints.
    """
    for run in runs:
        check_run_folder(run.folder, run.config.to_yaml())
    pending = [run for run in runs if not is_done(run)]
    active: list[_Job] = []
    failures: list[Failure] = []
    reporter = _ProgressReporter(runs, say)
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        while pending or active:
            while pending and len(active) < jobs:
                active.append(_start(pending.pop(0), environment))
            time.sleep(POLL_SECS)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                failure = _find_failure(job)
                failures += [failure] if failure else []
                outcome = f"failed: {failure.reason}" if failure else "complete"
                reporter.report(len(active), len(pending), f"{job.run.name} {outcome}; ")
            reporter.report_if_due(len(active), len(pending))
    except KeyboardInterrupt:
        _stop(active)
        raise Interrupted from None
    except BaseException:  # For example, a closed pipe. The active runs still save checkpoints.
        _stop(active)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        for job in active:
            if job.process.poll() is None:
                job.process.kill()
    return failures


def log_file(run: PlannedRun) -> Path:
    """Returns the log file of a run's process. It is outside the run directory, to which only the run itself writes."""
    return run.folder.with_name(run.folder.name + ".log")


def _start(run: PlannedRun, environment: Mapping[str, str]) -> _Job:
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
                # Ctrl-C must reach the runs only through `_stop`; a second signal would kill them without a checkpoint.
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"--out: {run.folder.parent}: {error.strerror}") from error
    return _Job(run, process)


def _find_failure(job: _Job) -> Failure | None:
    """Returns the failure of a run that has ended; if the run is complete, writes its record and returns None."""
    if is_done(job.run):
        collect_result(job.run)
        return None
    lines = [line for line in log_file(job.run).read_text(errors="replace").splitlines() if line]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["no output"])[-1]
    reason = f"{last[:300]} (exit code {job.process.returncode}; {log_file(job.run)})"
    return Failure(job.run, reason)


def _stop(active: Sequence[_Job]) -> None:
    """Tells all active runs to save a checkpoint and exit, and waits for them."""
    for job in active:
        job.process.send_signal(signal.SIGINT)
    for job in active:
        job.process.wait()


def _raise_interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt


class _ProgressReporter:
    """Reports the number of completed runs, the number of runs per hour, and the estimated time left."""

    def __init__(self, runs: Sequence[PlannedRun], say: Say):
        self._runs, self._say = runs, say
        self._started = self._last_report = time.monotonic()
        self._done_before = self._num_done()

    def _num_done(self) -> float:
        """Returns the number of finished runs. An unfinished run counts as the fraction of its budget spent so far."""
        return sum(1.0 if is_done(run) else progress(run) for run in self._runs)

    def report_if_due(self, num_active: int, num_pending: int) -> None:
        if time.monotonic() - self._last_report >= REPORT_SECS:
            self.report(num_active, num_pending)

    def report(self, num_active: int, num_pending: int, prefix: str = "") -> None:
        self._last_report = now = time.monotonic()
        done, hours = self._num_done(), (now - self._started) / 3600
        rate = (done - self._done_before) / hours
        pace = ""
        if rate > 0:
            minutes_left = (len(self._runs) - done) / rate * 60
            pace = f"; {rate:.1f} runs per hour, {minutes_left:.0f} min left"
        num_complete = sum(map(is_done, self._runs))
        self._say(
            f"{prefix}{num_complete} of {len(self._runs)} runs complete, {num_active} active, "
            f"{num_pending} pending{pace}"
        )
