"""Trains for thousands of steps while faults strike, and checks for leaks of memory, open files and threads.

    python tools/soak.py [--steps 2000] [--seed 0] [--folder DIR]

The process must survive all faults: it is suspended for up to three seconds, its grading processes are killed, `tb/` is
deleted, foreign files appear in its folders, and its oldest checkpoint is damaged. Its memory, open files and threads
are read from `/proc` (Linux only), and the values at the end are compared with those after a tenth of the steps. The
exit code is 1 if the run fails, if its resident anonymous memory has grown by more than 3%, or if it has more open
files or threads than before. The total resident memory is printed as well, but not checked, because it includes pages
of mapped files, which the kernel drops and reloads at will.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from fault_harness import jobs
from fault_harness.comparison import read_lines
from trapo_jax.runs.directory import CHECKPOINTS, METRICS, TENSORBOARD

MAX_GROWTH = 0.03
# Names of threads in pools of bounded size. Such a pool starts a new thread only when all of its threads are busy.
# TensorStore saves checkpoints with a pool of this kind.
POOLS = ("ts_pool_worker",)
NUM_SAMPLES = 40  # number of consecutive steps whose median is compared
JOB = (
    "train.problems_per_step=2",
    "train.warmup_steps=2",
    "checkpoint.every=20",
    "evaluation.every=50",
    "evaluation.num_samples=1",
    "data.num_validation=8",
    "data.num_test=8",
    "rewards.functions=[card_shuffles,math]",
    "rewards.max_error_rate=1",
)


class Measurement(NamedTuple):
    """The resources that a process uses.

    Attributes:
      anonymous: resident anonymous memory in MiB.
      resident: all resident memory in MiB, including pages of mapped files.
      num_files: number of open files.
      num_threads: number of threads, except those of `POOLS`.
    """

    anonymous: float
    resident: float
    num_files: int
    num_threads: int


def measure(pid: int) -> Measurement:
    """Measures the resources that a process uses."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {name: values for name, *values in lines}
    kibibytes = (int(status[name][0]) for name in ("RssAnon:", "VmRSS:"))
    anonymous, resident = (value / 2**10 for value in kibibytes)
    names = [name for name in thread_names(pid) if name not in POOLS]
    return Measurement(anonymous, resident, len(os.listdir(f"/proc/{pid}/fd")), len(names))


def thread_names(pid: int) -> list[str]:
    """Returns the names of a process's threads."""
    names = []
    for file in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # The thread may have just ended.
            names.append(file.read_text().strip())
    return names


def children(pid: int) -> list[int]:
    """Returns the ids of a process's child processes."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def median(measurements: list[Measurement]) -> Measurement:
    """Returns the median of each field."""
    return Measurement(*map(statistics.median, zip(*measurements, strict=True)))


def stop_for_a_while(process: Popen, folder: Path, rng: random.Random) -> None:
    del folder
    process.send_signal(signal.SIGSTOP)
    time.sleep(rng.uniform(0.1, 3))
    process.send_signal(signal.SIGCONT)


def kill_a_grader(process: Popen, folder: Path, rng: random.Random) -> None:
    del folder
    if workers := children(process.pid):
        os.kill(rng.choice(workers), signal.SIGKILL)


def delete_events(process: Popen, folder: Path, rng: random.Random) -> None:
    del process, rng
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)


def leave_a_file(process: Popen, folder: Path, rng: random.Random) -> None:
    del process
    for path in (folder, folder / CHECKPOINTS):
        (path / f"note_{rng.randrange(100)}").write_text("mine")


def damage_an_old_checkpoint(process: Popen, folder: Path, rng: random.Random) -> None:
    del process, rng
    steps = sorted(int(x.name) for x in (folder / CHECKPOINTS).iterdir() if x.name.isdecimal())
    files = [x for x in (folder / CHECKPOINTS / str(steps[0])).rglob("*") if x.is_file()]
    if len(steps) > 1 and files:
        files[0].write_bytes(b"damaged")


FAULTS: Mapping[str, Callable[[Popen, Path, random.Random], None]] = {
    "stopped": stop_for_a_while,
    "grader killed": kill_a_grader,
    "tb/ deleted": delete_events,
    "foreign files": leave_a_file,
    "checkpoint damaged": damage_an_old_checkpoint,
}


def last_step(folder: Path) -> int:
    """Returns the number of steps recorded in metrics.jsonl."""
    return sum('"kind": "train"' in line for line in read_lines(folder / METRICS))


def soak(folder: Path, num_steps: int, rng: random.Random) -> tuple[list[Measurement], int, str]:
    """Trains while faults strike, and returns a measurement per step, the exit code and the output."""
    log = folder.with_suffix(".log")
    process = jobs.start(folder, (*JOB, f"train.num_steps={num_steps}"), log=log)
    measurements, next_fault = [], 20
    while process.poll() is None:
        step = last_step(folder)
        if step > len(measurements):
            with contextlib.suppress(OSError, KeyError):  # The process may have just ended.
                measurements += [measure(process.pid)] * (step - len(measurements))
        if step >= next_fault:
            name = rng.choice(sorted(FAULTS))
            print(f"step {step}: {name}", flush=True)
            try:
                FAULTS[name](process, folder, rng)
            except OSError as error:  # The run may be deleting the same files.
                print(f"step {step}: {name}: {error}", flush=True)
            next_fault = step + rng.randint(5, 25)
        time.sleep(0.02)
    return measurements, process.returncode, log.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="number of training steps")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the faults")
    parser.add_argument("--folder", type=Path, help="folder for the run (default: a new one)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.absolute() / "compiled")
    run = folder.absolute() / "run"
    measurements, code, output = soak(run, args.steps, random.Random(args.seed))
    if code or len(measurements) < args.steps:
        print(f"seed {args.seed}: exit code {code} after {len(measurements)} steps\n{output}")
        return 1
    tenth = args.steps // 10
    series = [median(measurements[i : i + NUM_SAMPLES]) for i in range(tenth, args.steps, tenth)]
    series.append(median(measurements[-NUM_SAMPLES:]))
    for i, measurement in enumerate(series, start=1):
        print(f"after step {i * tenth}: {measurement}")
    early, late = series[0], series[-1]
    growth = late.anonymous / early.anonymous - 1
    growth_of_all = late.resident / early.resident - 1
    print(f"growth {growth:+.2%} of anonymous memory, {growth_of_all:+.2%} of all resident memory")
    is_flat = growth <= MAX_GROWTH and late.num_files <= early.num_files
    return int(not (is_flat and late.num_threads <= early.num_threads))


if __name__ == "__main__":
    sys.exit(main())
