"""Lets faults strike runs, resumes them, and compares them bit for bit with an uninterrupted run.

    python tools/inject_faults.py [--kills 20] [--full-disks 4] [--checkpoints 4] [--others 1] [--minutes M]
                                  [--only NAME] [--seed 0] [--folder DIR]

The run is a short version of the default job. Kills and full disks come at random times and at named moments, in turn
(`fault_harness/strike_at.py` lists them). Other faults are signals, a lack of open files, a run directory that is moved
away, checkpoints that are swapped, renamed or copied, files of someone else in every folder, spoiled TensorBoard folders,
a clock that is set back, and mistaken commands, files and environments. Full disks need root, for a small tmpfs.

For each fault, its seed and the progress of the run are printed, and a table at the end; `--only NAME --seed N` repeats
one. The comparison covers `metrics.jsonl` (without timings), `samples.jsonl`, the evaluations, the exported weights, and
the parameters, optimizer state and host state of the last checkpoint; on another mesh, they must agree to within 1e-5.
Nothing may be written outside the run directory. The exit code is 1 if anything is not as it should be.
"""

import argparse
import collections
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fault_harness import jobs
from fault_harness.comparison import differences, read_lines
from fault_harness.disks import can_mount
from fault_harness.faults import (
    Bench,
    Fault,
    disk_faults,
    full_disk_at_moment,
    full_disk_at_random,
    interruptions,
    kill_at_moment,
    kill_at_random,
    misplaced_checkpoints,
)
from fault_harness.jobs import Failure, TooLate
from fault_harness.refusals import refusals
from trapo_jax.runs.directory import METRICS

ELSEWHERE = "elsewhere"  # a folder for what a run writes to the user's folders
OTHER_JOB = (*jobs.JOB, "seed=1")
MAX_TRIES = 8  # of a fault that comes too late


def plan_faults(args: argparse.Namespace, *, has_disks: bool) -> list[Fault]:
    """Returns the faults that the arguments ask for."""
    kills = [Fault("kill at random", kill_at_random), Fault("kill at a moment", kill_at_moment)]
    disks = [
        Fault("full disk at random", full_disk_at_random),
        Fault("full disk at a moment", full_disk_at_moment),
    ]
    others = [*interruptions(), *(disk_faults() if has_disks else ()), *refusals()]
    faults = list(itertools.islice(itertools.cycle(kills), args.kills))
    if has_disks:
        faults += itertools.islice(itertools.cycle(disks), args.full_disks)
    faults += [Fault("misplaced checkpoints", misplaced_checkpoints)] * args.checkpoints
    faults += others * args.others
    if args.only:
        every = {fault.name: fault for fault in [*kills, *disks, *others]}
        faults = [every[args.only]] * max(1, sum(fault.name == args.only for fault in faults))
    return faults


def prepare(folder: Path) -> Bench:
    """Makes the runs with which others are compared, unless an earlier call has made them.

    Raises:
      Failure: if the same run differs when it is repeated.
    """
    print(f"runs in {folder}", flush=True)
    for name, job in (("uninterrupted", jobs.JOB), ("again", jobs.JOB), ("other", OTHER_JOB)):
        jobs.complete(folder / name, job)
    if found := differences(folder / "again", folder / "uninterrupted"):
        raise Failure(f"the same run, repeated, differs in {', '.join(found)}")
    num_records = len(read_lines(folder / "uninterrupted" / METRICS))
    return Bench(folder / "uninterrupted", folder / "other", num_records)


def schedule(faults: Sequence[Fault], minutes: float | None) -> Iterator[Fault]:
    """Yields the faults once, or again and again until the time is over."""
    if minutes is None:
        yield from faults
        return
    deadline = time.monotonic() + 60 * minutes
    for fault in itertools.cycle(faults):
        if time.monotonic() > deadline:
            return
        yield fault


def try_fault(fault: Fault, bench: Bench, folder: Path, seeds: Iterator[int]) -> tuple[int, str]:
    """Lets a fault strike, with further seeds while it comes too late; returns the seed and what was wrong, if anything."""
    elsewhere = folder / ELSEWHERE
    for seed in itertools.islice(seeds, MAX_TRIES):
        place, wrong = folder / f"fault_{seed}", ""
        try:
            reached = fault.try_once(bench, place, seed)
        except TooLate:
            print(f"seed {seed}: {fault.name}: too late", flush=True)
            shutil.rmtree(place, ignore_errors=True)
            continue
        except Failure as error:
            reached, wrong = "", str(error)
        if written := [str(path) for path in elsewhere.rglob("*") if path.is_file()]:
            wrong += f" written outside of output_dir: {', '.join(written)}"
        print(f"seed {seed}: {fault.name}: {reached} -> {wrong or 'ok'}", flush=True)
        if not wrong:
            shutil.rmtree(place, ignore_errors=True)
        return seed, wrong
    print(f"{fault.name}: always came too late", flush=True)
    return -1, "always too late"


def print_table(tried: collections.Counter[str], failed: dict[str, list[int]]) -> None:
    """Prints how often each fault was tried, how often it was withstood, and the seeds of the others."""
    width = max(map(len, tried))
    print(f"\n{'fault':{width}}  tried  held  seeds that failed")
    for name, count in tried.items():
        seeds = failed.get(name, [])
        print(f"{name:{width}}  {count:5}  {count - len(seeds):4}  {' '.join(map(str, seeds))}")
    num_failed = sum(map(len, failed.values()))
    print(f"{tried.total() - num_failed} of {tried.total()} faults held")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--full-disks", type=int, default=4, help="number of full disks")
    parser.add_argument("--checkpoints", type=int, default=4, help="number of misplaced ones")
    parser.add_argument("--others", type=int, default=1, help="how often every other fault strikes")
    parser.add_argument("--minutes", type=float, help="repeat all for so long (default: once)")
    parser.add_argument("--only", help="name of the only fault to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first fault; then + 1")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the runs, also of an earlier call (default: a new one)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would pass on that it is ignored.
    folder = args.folder or Path(tempfile.mkdtemp(prefix="inject_faults_"))
    elsewhere = folder.absolute() / ELSEWHERE
    elsewhere.mkdir(parents=True, exist_ok=True)
    # With a warm compilation cache, faults occur during training instead of compilation.
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "HOME": str(elsewhere),
        "TMPDIR": str(elsewhere),
    }
    bench = prepare(folder.absolute())
    has_disks = can_mount(folder)
    if not has_disks:
        print("no full disks: mounting a tmpfs needs root")
    tried: collections.Counter[str] = collections.Counter()
    failed: dict[str, list[int]] = {}
    seeds = itertools.count(args.seed)
    for fault in schedule(plan_faults(args, has_disks=has_disks), args.minutes):
        seed, wrong = try_fault(fault, bench, folder.absolute(), seeds)
        tried[fault.name] += 1
        if wrong:
            failed.setdefault(fault.name, []).append(seed)
    print_table(tried, failed)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
