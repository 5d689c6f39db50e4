"""Kills runs at random times, resumes them, and compares them bit for bit with an uninterrupted run.

    python tools/inject_faults.py [--kills 20] [--seed 0] [--folder DIR]

The run is a short version of the default job. For each fault, its seed and the progress of the run are printed. The
comparison covers `metrics.jsonl` (without timings), `samples.jsonl`, and the parameters, optimizer state and host state
of the last checkpoint. One run resumes on another mesh and must agree to within 1e-5. The exit code is 1 if anything
differs.
"""

import argparse
import collections
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from orbax.checkpoint import v1 as ocp

from trapo_jax.runs.directory import CHECKPOINTS, METRICS, SAMPLES

NUM_STEPS = 40
JOB = (
    f"train.num_steps={NUM_STEPS}",
    "train.warmup_steps=4",
    "checkpoint.every=4",
    "evaluation.every=10",
    "evaluation.num_samples=2",
    "data.num_validation=16",
    "data.num_test=24",
)
TOLERANCE_ON_ANOTHER_MESH = 1e-5


class TooLate(Exception):
    """The run finished before it was interrupted."""


def start(folder: Path, job: Sequence[str] = JOB, **environment: str) -> subprocess.Popen:
    """Starts or resumes the job in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "trapo_jax.train", f"output_dir={folder}", *job],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def complete(folder: Path, job: Sequence[str] = JOB, **environment: str) -> str:
    """Runs the job to completion and returns its output."""
    process = start(folder, job, **environment)
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{folder}: exit code {process.returncode}\n{output}")
    return output


def interrupt(
    folder: Path, number: signal.Signals, after_secs: float, job: Sequence[str] = JOB
) -> str:
    """Starts the job, sends it a signal, waits until it exits, and returns its progress.

    Raises:
      TooLate: if the job finished before the signal was sent.
    """
    process = start(folder, job)
    try:
        process.communicate(timeout=after_secs)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        process.communicate()
        return progress(folder)
    raise TooLate


def progress(folder: Path) -> str:
    """Describes the last record of the metrics and the checkpoint folders, including incomplete ones."""
    lines = read_lines(folder / METRICS)
    last = json.loads(lines[-1]) if lines else None
    reached = f"after {last['kind']} {last['step']}" if last else "before any record"
    checkpoints = folder / CHECKPOINTS
    names = sorted(p.name for p in checkpoints.iterdir()) if checkpoints.is_dir() else []
    return f"{reached}; checkpoints: {' '.join(names) or 'none'}"


def read_lines(path: Path) -> list[str]:
    """Returns the complete lines of a file, whose last line may be incomplete."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def differences(ours: Path, theirs: Path, *, tolerance: float = 0.0) -> list[str]:
    """Returns the names of all files, arrays and fields that differ between two complete runs.

    Args:
      ours, theirs: run directories.
      tolerance: relative and absolute tolerance of numbers; 0 requires bitwise equality.
    """
    found = []
    records, their_records = (
        [_untimed(line) for line in read_lines(folder / METRICS)] for folder in (ours, theirs)
    )
    if not _same_records(records, their_records, tolerance):
        found.append(METRICS)
    if tolerance == 0 and _bytes(ours, SAMPLES) != _bytes(theirs, SAMPLES):
        found.append(SAMPLES)
    state, host = read_checkpoint(ours)
    their_state, their_host = read_checkpoint(theirs)
    if _without_seconds(host["usage"]) != _without_seconds(their_host["usage"]):
        found.append("usage")
    if host["method_state"] != their_host["method_state"]:
        found.append("method_state")
    for name, leaf in their_state.items():
        if not _same_array(state[name], leaf, tolerance):
            found.append(name)
    return found


def read_checkpoint(
    folder: Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a checkpoint (by default, the last one) by path, and the host state."""
    import jax

    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")  # as in CheckpointStore
    context = ocp.Context()
    context.checkpointables.registry = registry
    steps = [int(path.name) for path in (folder / CHECKPOINTS).iterdir()]
    path = str((folder / CHECKPOINTS / str(step or max(steps))).absolute())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with context:
        shapes = ocp.checkpointables_metadata(path).metadata["state"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        loaded = ocp.load_checkpointables(path, {"state": abstract, "host": None})
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded["state"])
    return {jax.tree_util.keystr(name): np.asarray(x) for name, x in flat}, loaded["host"]


def _without_seconds(usage: dict[str, Any]) -> dict[str, Any]:
    return {name: count for name, count in usage.items() if name != "seconds"}


def _untimed(line: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}


# Prefixes of metrics that depend on the mesh or consist of rounding errors.
MESH_DEPENDENT = ("batch/pad", "batch/balance", "sampling/slot_utilization", "policy/logprob_gap")


def _bytes(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def _same_records(ours: list[dict], theirs: list[dict], tolerance: float) -> bool:
    if tolerance == 0 or len(ours) != len(theirs):
        return ours == theirs
    is_same = lambda a, b: (
        np.isclose(a, b, rtol=tolerance, atol=tolerance) if isinstance(a, float) else a == b
    )
    return all(
        a.keys() == b.keys()
        and all(is_same(a[k], b[k]) for k in a if not k.startswith(MESH_DEPENDENT))
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_array(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> bool:
    if tolerance == 0:
        return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return np.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs at random times")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first fault; the following faults use the following seeds",
    )
    parser.add_argument(
        "--folder", type=Path, help="folder of the runs (default: a temporary folder)"
    )
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="inject_faults_"))
    # With a warm compilation cache, faults occur during training instead of compilation.
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    uninterrupted = folder / "uninterrupted"
    complete(uninterrupted)
    started = time.monotonic()
    complete(folder / "again")
    whole_secs = time.monotonic() - started
    same = differences(folder / "again", uninterrupted) or "equal, bit for bit"
    print(
        f"runs in {folder}; an uninterrupted run takes {whole_secs:.0f} s; repeated: {same}",
        flush=True,
    )
    faults = collections.deque(plan_faults(args.kills, whole_secs))
    num_faults, num_bad, num_struck = len(faults), 0, 0
    for seed in itertools.count(args.seed):
        if not faults:
            break
        fault, run = faults.popleft(), folder / f"fault_{seed}"
        try:
            reached = fault.strike(run, random.Random(seed))
        except TooLate:
            print(f"seed {seed}: {fault.name} came too late and is tried again", flush=True)
            faults.append(fault)
            continue
        complete(run, **fault.environment)
        found = differences(run, uninterrupted, tolerance=fault.tolerance)
        num_bad, num_struck = num_bad + bool(found), num_struck + 1
        equal = f"equal to {fault.tolerance:g}" if fault.tolerance else "equal, bit for bit"
        print(
            f"{num_struck}/{num_faults} seed {seed}: {fault.name} {reached} -> "
            f"{'differs in ' + ', '.join(found) if found else equal}",
            flush=True,
        )
    print(f"{num_faults - num_bad} of {num_faults} runs equal the uninterrupted run")
    return int(num_bad > 0)


class Fault(NamedTuple):
    """A fault: a function that interrupts a run, the environment in which the run resumes, and the tolerance."""

    name: str
    strike: Callable[[Path, random.Random], str]
    environment: Mapping[str, str] = MappingProxyType({})
    tolerance: float = 0.0


def plan_faults(num_kills: int, whole_secs: float) -> list[Fault]:
    """Returns `num_kills` SIGKILLs at random times in a run of `whole_secs` seconds, and one of each other fault."""
    kill = lambda f, rng: interrupt(f, signal.SIGKILL, rng.uniform(0.1, 1) * whole_secs)
    stop = lambda f, rng: interrupt(f, signal.SIGTERM, rng.uniform(0.3, 0.9) * whole_secs)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return [
        *[Fault("SIGKILL", kill)] * num_kills,
        Fault("SIGTERM", stop),
        Fault("two kills in a row", lambda f, rng: _two_kills(f, rng, whole_secs)),
        Fault("SIGTERM, then two devices", stop, {"XLA_FLAGS": flags}, TOLERANCE_ON_ANOTHER_MESH),
    ]


def _two_kills(folder: Path, rng: random.Random, whole_secs: float) -> str:
    reached = [
        interrupt(folder, signal.SIGKILL, rng.uniform(0.3, 0.6) * whole_secs) for _ in range(2)
    ]
    return " and ".join(reached)


if __name__ == "__main__":
    sys.exit(main())
