"""Defines the job into which faults are injected, starts it, waits for it, and checks its output."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fault_harness.comparison import read_lines
from trapo_jax.runs.directory import CHECKPOINTS, METRICS
from trapo_jax.runs.system_errors import EXIT_FAILED, EXIT_USER_ERROR  # noqa: F401

REPOSITORY = Path(__file__).parents[2]
JOB = (
    "train.num_steps=9",
    "train.problems_per_step=4",
    "train.warmup_steps=2",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "checkpoint.keep_best=1",
    "evaluation.every=4",
    "evaluation.num_samples=1",
    "data.num_validation=8",
    "data.num_test=8",
)
TRAIN = ("-m", "trapo_jax.train")
STRIKE_AT = (str(Path(__file__).with_name("strike_at.py")),)


class TooLate(Exception):
    """The run finished before the fault could strike, so nothing was tested."""


class Failure(Exception):
    """The program did not handle a fault correctly. The message describes what went wrong."""


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    output: str

    def lines(self, start: str) -> list[str]:
        """Returns the output lines that begin with `start`."""
        return [line for line in self.output.splitlines() if line.startswith(start)]


def start(
    folder: Path,
    job: Sequence[str] = JOB,
    *,
    program: Sequence[str] = TRAIN,
    environment: Mapping[str, str] = MappingProxyType({}),
    log: Path | None = None,
) -> subprocess.Popen:
    """Starts or resumes the job in a separate process.

    Args:
      folder: the run directory.
      job: arguments of the program, in addition to `output_dir`.
      program: arguments of the Python interpreter: a script, or `-m` and a module.
      environment: environment variables to set.
      log: file for the output. If None, the output goes to a pipe.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with contextlib.ExitStack() as stack:
        return subprocess.Popen(
            [sys.executable, *program, f"output_dir={folder}", *job],
            cwd=REPOSITORY,
            stdout=stack.enter_context(open(log, "w")) if log else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )


def finish(process: subprocess.Popen) -> Ended:
    """Waits until a process ends, and returns its exit code and output."""
    output = process.communicate()[0]
    return Ended(process.returncode, output)


def complete(
    folder: Path,
    job: Sequence[str] = JOB,
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Runs the job to completion and returns its output.

    Raises:
      Failure: if the run fails.
    """
    ended = finish(start(folder, job, environment=environment))
    if ended.code:
        raise Failure(f"the run ended with exit code {ended.code}: {ended.output[-2000:]}")
    return ended.output


def check_refusal(ended: Ended, *codes: int) -> str:
    """Returns the error line of a process that must have failed with one of the given exit codes.

    Raises:
      Failure: if the exit code is not one of `codes`, the number of error lines is not one, or a traceback was printed.
    """
    errors = ended.lines("error: ")
    if ended.code not in codes or len(errors) != 1 or "Traceback" in ended.output:
        raise Failure(f"exit code {ended.code}, {len(errors)} error lines: {ended.output[-2000:]}")
    return errors[0]


def wait_for_records(process: subprocess.Popen, folder: Path, number: int, secs: float) -> None:
    """Waits until a run has written `number` records, and then for another `secs` seconds.

    Raises:
      TooLate: if the process ends first.
    """
    while len(read_lines(folder / METRICS)) < number and process.poll() is None:
        time.sleep(0.01)
    time.sleep(secs)
    if process.poll() is not None:
        raise TooLate


def progress(folder: Path) -> str:
    """Describes a run's progress: its last metrics record, and its checkpoint folders, including incomplete ones."""
    lines = read_lines(folder / METRICS)
    last = json.loads(lines[-1]) if lines else None
    reached = f"after {last['kind']} {last['step']}" if last else "before any record"
    checkpoints = folder / CHECKPOINTS
    names = sorted(p.name for p in checkpoints.iterdir()) if checkpoints.is_dir() else []
    return f"{reached}; checkpoints: {' '.join(names) or 'none'}"
