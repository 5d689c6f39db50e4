"""Injects faults into runs, resumes the runs, and compares them bit for bit with an uninterrupted run.

    python tools/inject_faults.py [--kills 20] [--full-disks 4] [--checkpoints 4] [--others 1] [--minutes M]
                                  [--only NAME] [--seed 0] [--folder DIR]

The runs execute a short version of the default job. Kills and full disks alternate between random times and named
moments (see `MOMENTS` in `fault_harness/strike_at.py`). The other faults are signals, a low limit on open files, a run
directory that is moved away, checkpoints that are swapped, renamed or copied, foreign files in every folder, deleted,
full or read-only TensorBoard folders, a clock that is set back, and mistakes in commands, files and environments.
Faults that need a small disk mount a tmpfs, which requires root.

The tool prints the seed of each fault and the run's progress when the fault struck, and a table at the end. To repeat a
fault, pass `--only NAME --seed N`. The comparison covers `metrics.jsonl` (without timings), `samples.jsonl`, the
evaluations, the exported weights, and the parameters, optimizer state and host state of the last checkpoint; on a
different mesh, values must agree to within 1e-5. Nothing may be written outside the run directory. The exit code is 1
if any fault was not handled correctly.
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

ELSEWHERE = "elsewhere"  # folder used as HOME and TMPDIR of the runs; it must remain empty
OTHER_JOB = (*jobs.JOB, "seed=1")
MAX_TRIES = 8  # maximum number of attempts per fault, if it strikes too late


def plan_faults(args: argparse.Namespace, *, has_disks: bool) -> list[Fault]:
    """Returns the faults selected by the command-line arguments."""
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
    """Executes the reference runs, except those that are already complete in the folder.

    Raises:
      Failure: if two runs of the same job differ.
    """
    print(f"runs in {folder}", flush=True)
    for name, job in (("uninterrupted", jobs.JOB), ("again", jobs.JOB), ("other", OTHER_JOB)):
        jobs.complete(folder / name, job)
    if found := differences(folder / "again", folder / "uninterrupted"):
        raise Failure(f"two runs of the same job differ in {', '.join(found)}")
    num_records = len(read_lines(folder / "uninterrupted" / METRICS))
    return Bench(folder / "uninterrupted", folder / "other", num_records)


def schedule(faults: Sequence[Fault], minutes: float | None) -> Iterator[Fault]:
    """Yields each fault once or, if `minutes` is given, repeats all faults until that time has passed."""
    if minutes is None:
        yield from faults
        return
    deadline = time.monotonic() + 60 * minutes
    for fault in itertools.cycle(faults):
        if time.monotonic() > deadline:
            return
        yield fault


def try_fault(fault: Fault, bench: Bench, folder: Path, seeds: Iterator[int]) -> tuple[int, str]:
    """Injects a fault, retrying with the next seed if it strikes too late.

    Returns:
      The seed (-1 if all attempts came too late), and a description of what went wrong ("" if nothing did).
    """
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
    """Prints how often each fault was tried, how often it was handled correctly, and the seeds for which it was not."""
    width = max(map(len, tried))
    print(f"\n{'fault':{width}}  tried  passed  seeds that failed")
    for name, count in tried.items():
        seeds = failed.get(name, [])
        print(f"{name:{width}}  {count:5}  {count - len(seeds):6}  {' '.join(map(str, seeds))}")
    num_failed = sum(map(len, failed.values()))
    print(f"{tried.total() - num_failed} of {tried.total()} faults passed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--full-disks", type=int, default=4, help="number of full disks")
    parser.add_argument(
        "--checkpoints", type=int, default=4, help="number of times checkpoints are misplaced"
    )
    parser.add_argument(
        "--others", type=int, default=1, help="number of times each of the other faults is tried"
    )
    parser.add_argument(
        "--minutes", type=float, help="repeat all faults for M minutes (default: a single pass)"
    )
    parser.add_argument("--only", help="name of the only fault to try")
    parser.add_argument(
        "--seed", type=int, default=0, help="first seed; each attempt uses the next one"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder for the runs; may be the folder of an earlier invocation (default: a new one)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    # Under nohup, SIGHUP is ignored, and child processes would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="inject_faults_"))
    elsewhere = folder.absolute() / ELSEWHERE
    elsewhere.mkdir(parents=True, exist_ok=True)
    # With a warm compilation cache, faults strike during training rather than during compilation.
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
        print("skipping faults that need a small disk: mounting a tmpfs requires root")
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
