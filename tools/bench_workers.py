"""Runs the benchmarks' worker processes, which take turns (A B A B ...).

This module depends only on the standard library, because workers may run in an environment without trapo_jax.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]
# Disables TF32 in all JAX workers.
FLOAT32_MATMULS = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}


class Worker:
    """A process that runs one of the implementations being compared."""

    def __init__(self, script: Path, name: str, *arguments: str, python: str = sys.executable):
        self.name = name
        pipe = subprocess.PIPE
        # The workers share a GPU's memory, so none of them may preallocate it.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **FLOAT32_MATMULS}
        self._process = subprocess.Popen(
            [python, str(script), name, *arguments],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=environment,
        )
        self.is_installed = self._reply() is not None

    def run(self, job: Job) -> dict[str, Any]:
        """Runs a job in the process and returns its reply."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if reply is None:
            sys.exit(f"{self.name} exited with code {self._process.wait()} during {job['name']}")
        return reply

    def close(self) -> None:
        """Closes the process's standard input and waits for it to exit."""
        self._process.communicate()

    def _reply(self) -> dict[str, Any] | None:
        """Returns the next reply, or None if the process has exited."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def start_workers(
    script: Path, names: Sequence[str], *arguments: str, tunix_python: str
) -> list[Worker]:
    """Starts a process for each installed implementation, and reports those that are not installed."""
    started = [
        Worker(script, name, *arguments, python=tunix_python if name == "tunix" else sys.executable)
        for name in names
    ]
    for worker in started:
        if not worker.is_installed:
            print(f"{worker.name} is not installed and is skipped")
    return [worker for worker in started if worker.is_installed]


def common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options shared by all benchmarks."""
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of measured rounds (default 3)"
    )
    parser.add_argument(
        "--tunix-python",
        default=sys.executable,
        help="Python interpreter of an environment with google-tunix",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results to this file"
    )


def take_turns(
    workers: Sequence[Worker],
    job: Job,
    repeats: int,
    track: Callable[..., Any],
) -> dict[str, list[dict]]:
    """Runs a job on all workers in turn: once to warm up, then `repeats` times.

    Medians are printed immediately, in case something fails later.

    Returns:
      The replies of each worker, starting with its reply to the warm-up, keyed by the worker's name.
    """
    selected = [w for w in workers if w.name in job.get("only", [w.name])]
    replies: dict[str, list[dict]] = {worker.name: [] for worker in selected}
    for worker in track([w for _ in range(1 + repeats) for w in selected], description=job["name"]):
        replies[worker.name].append(worker.run(job))
    found = (f"{name} {median(done[1:], 'seconds'):.3f} s" for name, done in replies.items())
    print(f"{job['name']}: {', '.join(found)}", flush=True)
    return replies


def serve(implementations: Mapping[str, Callable[..., Any]]) -> int:
    """Runs a worker that was started as `SCRIPT NAME ARGUMENTS...`.

    The worker reads jobs from standard input and writes replies to standard output.
    """
    name, *arguments = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps library output separate from the replies
    try:
        implementation = implementations[name](*arguments)
    except ModuleNotFoundError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 1
    print(json.dumps({"engine": name}), file=replies, flush=True)
    for line in sys.stdin:
        reply = implementation.run(json.loads(line))
        reply["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(reply), file=replies, flush=True)
    return 0


def median(replies: Sequence[dict], name: str) -> float:
    """Returns the median of a field over the replies."""
    return statistics.median(reply[name] for reply in replies)
