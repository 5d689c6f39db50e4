"""Defines faults that interrupt a run or interfere with it.

After each fault, the resumed run must reproduce an uninterrupted run bit for bit.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fault_harness import jobs
from fault_harness.comparison import TOLERANCE_ON_ANOTHER_MESH, differences
from fault_harness.disks import small_disk
from fault_harness.foreign_files import assert_untouched, plant
from fault_harness.jobs import Failure, TooLate
from fault_harness.strike_at import MOMENTS, fill
from trapo_jax.runs.directory import CHECKPOINTS, EXPORT, SUMMARY, TENSORBOARD

MAX_DELAY_SECS = 1.0  # maximum delay after a record; a run writes about two records per second
MAX_CALLS = 4  # A fault at a named moment strikes before one of the first MAX_CALLS calls of the moment's function.
KILL, HOUR_BACK = "kill", "clock"  # actions of `strike_at.py`


class Bench(NamedTuple):
    """The reference runs of a fault test.

    Attributes:
      uninterrupted: a finished run; runs with injected faults must reproduce it exactly.
      other: a finished run with a different seed.
      num_records: number of records in a complete metrics.jsonl, used to choose random times.
    """

    uninterrupted: Path
    other: Path
    num_records: int

    def start_and_wait(
        self, run: Path, rng: random.Random, job: Sequence[str] = jobs.JOB, *, first: int = 0
    ) -> subprocess.Popen:
        """Starts or resumes a run, waits for a random time, and returns its process.

        Args:
          run: the run directory.
          rng: random number generator.
          job: arguments of the run.
          first: minimum number of records to wait for.

        Raises:
          TooLate: if the run finishes first.
        """
        process = jobs.start(run, job)
        number = rng.randint(first, self.num_records)
        secs = rng.uniform(0, MAX_DELAY_SECS)
        jobs.wait_for_records(process, run, number, secs)
        return process


class Fault(NamedTuple):
    """A kind of fault.

    Attributes:
      name: a short description of the fault.
      strike: applies the fault to the run in the given directory, and returns a description of the state in which the
        fault struck the run. Afterwards, the run is resumed unless it is complete.
      environment: environment variables to set for the resumed run.
      tolerance: tolerance of the comparison with the uninterrupted run.
      is_compared: whether to resume the run and compare it with the uninterrupted run.
    """

    name: str
    strike: Callable[[Bench, Path, random.Random], str]
    environment: Mapping[str, str] = MappingProxyType({})
    tolerance: float = 0.0
    is_compared: bool = True

    def try_once(self, bench: Bench, folder: Path, seed: int) -> str:
        """Applies the fault to a run, and returns a description of the state in which the fault struck it.

        Raises:
          TooLate: if the run finished before the fault could strike.
          Failure: if the program does not handle the fault correctly.
        """
        folder.mkdir(parents=True)
        on_disk = "disk" in self.name
        disk = small_disk(folder) if on_disk else None
        try:
            if disk:
                disk.__enter__()
            run = folder / "run"
            reached = self.strike(bench, run, random.Random(seed))
            if self.is_compared:
                self._compare(bench, run)
            return reached
        finally:
            if disk:
                disk.__exit__(None, None, None)

    def _compare(self, bench: Bench, run: Path) -> None:
        if not (run / SUMMARY).exists():
            jobs.complete(run, environment=self.environment)
        if found := differences(run, bench.uninterrupted, tolerance=self.tolerance):
            raise Failure(f"differs in {', '.join(found)}")


def kill_at_random(bench: Bench, run: Path, rng: random.Random) -> str:
    process = bench.start_and_wait(run, rng)
    process.kill()
    process.wait()
    return jobs.progress(run)


def kill_at_moment(bench: Bench, run: Path, rng: random.Random) -> str:
    """Kills a run at a named moment and, with probability 2/3, kills it again while it recovers."""
    del bench
    reached = _struck_at_moment(run, rng, KILL)[0]
    if rng.random() < 1 / 3:
        return reached
    try:
        return f"{reached}; then {_struck_at_moment(run, rng, KILL)[0]}"
    except TooLate:
        return reached


def two_kills(bench: Bench, run: Path, rng: random.Random) -> str:
    return " and ".join(kill_at_random(bench, run, rng) for _ in range(2))


def stop_by(number: signal.Signals) -> Callable[[Bench, Path, random.Random], str]:
    def stop(bench: Bench, run: Path, rng: random.Random) -> str:
        process = bench.start_and_wait(run, rng, first=1)
        process.send_signal(number)
        ended = jobs.finish(process)
        if "stopping as soon as possible" in ended.output and ended.code:
            raise Failure(f"exit code {ended.code} after {number.name}: {ended.output[-2000:]}")
        return jobs.progress(run)

    return stop


def suspend(bench: Bench, run: Path, rng: random.Random) -> str:
    """Suspends a process for longer than `limits.stuck_after_secs`. The process must not take this for a hang."""
    limit = 20.0
    job = (*jobs.JOB, f"limits.stuck_after_secs={limit}")
    process = bench.start_and_wait(run, rng, job, first=1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * limit)
    process.send_signal(signal.SIGCONT)
    ended = jobs.finish(process)
    if ended.code:
        raise Failure(f"exit code {ended.code}: {ended.output[-2000:]}")
    return f"suspended for {1.5 * limit:g} s"


def full_disk_at_random(bench: Bench, run: Path, rng: random.Random) -> str:
    process = bench.start_and_wait(run, rng)
    filler = run.parent / "filler"
    fill(filler)
    ended = jobs.finish(process)
    filler.unlink()
    if not ended.code:
        raise TooLate
    line = jobs.check_refusal(ended, jobs.EXIT_FAILED)
    return f"{jobs.progress(run) if run.is_dir() else 'before the run'}; {line}"


def full_disk_at_moment(bench: Bench, run: Path, rng: random.Random) -> str:
    del bench
    filler = run.parent / "filler"
    reached, ended = _struck_at_moment(run, rng, str(filler))
    filler.unlink()
    return f"{reached}; {jobs.check_refusal(ended, jobs.EXIT_FAILED)}"


def _struck_at_moment(run: Path, rng: random.Random, action: str) -> tuple[str, jobs.Ended]:
    moment, number = rng.choice(sorted(MOMENTS)), rng.randint(1, MAX_CALLS)
    arguments = (*jobs.STRIKE_AT, moment, str(number), action)
    ended = jobs.finish(jobs.start(run, program=arguments))
    if not ended.code:
        (run.parent / "filler").unlink(missing_ok=True)
        shutil.rmtree(run)
        raise TooLate
    if action == KILL and ended.code != -signal.SIGKILL:
        raise Failure(f"exit code {ended.code} before {moment}: {ended.output[-2000:]}")
    reached = jobs.progress(run) if run.is_dir() else "before the run"
    return f"{moment} {number}, {reached}", ended


def few_descriptors(bench: Bench, run: Path, rng: random.Random) -> str:
    """Lowers the open-file limit of a running process, so that opening a file fails in the middle of the run."""
    limit = rng.randint(12, 30)
    process = bench.start_and_wait(run, rng, first=1)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    ended = jobs.finish(process)
    line = jobs.check_refusal(ended, jobs.EXIT_FAILED) if ended.code else "the run completed"
    return f"at most {limit} open files, {jobs.progress(run)}; {line}"


def moved_folder(bench: Bench, run: Path, rng: random.Random) -> str:
    """Moves the run directory away during the run, and back after the process has ended."""
    process = bench.start_and_wait(run, rng, first=1)
    elsewhere = run.with_name("elsewhere")
    if not run.is_dir():
        process.kill()
        raise TooLate
    run.rename(elsewhere)
    ended = jobs.finish(process)
    shutil.rmtree(run, ignore_errors=True)
    elsewhere.rename(run)
    if not ended.code:
        raise TooLate
    return jobs.check_refusal(ended, jobs.EXIT_FAILED)


def copy_unfinished(bench: Bench, run: Path) -> list[int]:
    """Copies a finished run without its last checkpoint, its export and its summary.

    Returns:
      The steps of the copied checkpoints.
    """
    shutil.copytree(bench.uninterrupted, run)
    (run / SUMMARY).unlink()
    shutil.rmtree(run / EXPORT)
    steps = sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir())
    shutil.rmtree(run / CHECKPOINTS / str(steps[-1]))
    return steps[:-1]


def misplaced_checkpoints(bench: Bench, run: Path, rng: random.Random) -> str:
    """Swaps, renames or copies checkpoints. The run must reject them or resume from the correct one."""
    *_, old, new = copy_unfinished(bench, run)
    folder = run / CHECKPOINTS
    later = str(rng.randint(17, 99))
    source = bench.other / CHECKPOINTS
    changes = {
        "two swapped": [(new, "x"), (old, new), ("x", old)],
        "newest renamed": [(new, later)],
        "oldest renamed": [(old, later)],
        "oldest copied": [(folder / str(old), later)],
        "newest replaced by the older one": [(new, "x"), (folder / str(old), new)],
        "another run's copied": [(source / rng.choice(os.listdir(source)), later)],
        "newest replaced by another run's": [
            (new, "x"),
            (source / rng.choice(os.listdir(source)), new),
        ],
    }
    name = rng.choice(sorted(changes))
    for old_path, new_name in changes[name]:
        if isinstance(old_path, Path):
            shutil.copytree(old_path, folder / str(new_name))
        else:
            (folder / str(old_path)).rename(folder / str(new_name))
    ended = jobs.finish(jobs.start(run))
    if not ended.code:
        return f"{name}: resumed from the correct checkpoint"
    line = jobs.check_refusal(ended, jobs.EXIT_USER_ERROR)
    # The run was not resumed, so there is nothing to compare. A copy of the uninterrupted run passes the comparison.
    shutil.rmtree(run)
    shutil.copytree(bench.uninterrupted, run)
    return f"{name}: {line}"


def foreign_files(bench: Bench, run: Path, rng: random.Random) -> str:
    """Puts foreign files into every subfolder of a run. The run must leave them alone."""
    copy_unfinished(bench, run)
    planted = plant(run, rng)
    jobs.complete(run)
    assert_untouched(planted)
    return f"{len(planted)} files and folders"


def spoiled_tensorboard(how: str) -> Callable[[Bench, Path, random.Random], str]:
    """Returns a fault that interferes with the writing of TensorBoard events.

    The events only duplicate the metrics, so the run must succeed, with at most one warning.
    """

    def strike(bench: Bench, run: Path, rng: random.Random) -> str:
        folder = run / TENSORBOARD
        if how == "deleted":
            process = bench.start_and_wait(run, rng, first=1)
            shutil.rmtree(folder)
            return _check_warning(jobs.finish(process), "TensorBoard", at_most_one=True)
        copy_unfinished(bench, run)
        if how == HOUR_BACK:
            program = (*jobs.STRIKE_AT, "a record", "2", HOUR_BACK)
            ended = jobs.finish(jobs.start(run, program=program))
            return _check_warning(ended, "", at_most_one=True)
        with small_disk(folder, "size=4k" if how == "full" else "ro"):
            return _check_warning(jobs.finish(jobs.start(run)), "TensorBoard")

    return strike


def _check_warning(ended: jobs.Ended, what: str, *, at_most_one: bool = False) -> str:
    warnings = ended.lines("warning: ")
    expected = (0, 1) if at_most_one else (1,)
    if ended.code or len(warnings) not in expected or not all(what in x for x in warnings):
        raise Failure(f"exit code {ended.code}, {len(warnings)} warnings: {ended.output[-2000:]}")
    return warnings[0] if warnings else "no warning"


TWO_DEVICES = "--xla_force_host_platform_device_count=2"


def interruptions() -> Sequence[Fault]:
    """Returns one fault of each kind that does not need a small disk, except for single kills."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}"
    terminate = stop_by(signal.SIGTERM)
    another_mesh = Fault(
        "SIGTERM, then two devices", terminate, {"XLA_FLAGS": flags}, TOLERANCE_ON_ANOTHER_MESH
    )
    return [
        Fault("SIGTERM", terminate),
        Fault("SIGHUP", stop_by(signal.SIGHUP)),
        Fault("SIGINT", stop_by(signal.SIGINT)),
        Fault("two kills in a row", two_kills),
        another_mesh,
        Fault("SIGSTOP", suspend),
        Fault("few open files", few_descriptors),
        Fault("run folder moved", moved_folder),
        Fault("misplaced checkpoints", misplaced_checkpoints),
        Fault("foreign files", foreign_files),
        Fault("tb/ deleted", spoiled_tensorboard("deleted")),
        Fault("clock an hour back", spoiled_tensorboard(HOUR_BACK)),
    ]


def disk_faults() -> Sequence[Fault]:
    """Returns the TensorBoard faults that need a small disk."""
    return [
        Fault("tb/ full", spoiled_tensorboard("full")),
        Fault("tb/ unwritable", spoiled_tensorboard("read-only")),
    ]
