"""What the benchmarks share: contenders in processes of their own, asked in turn, A B A B ...

Standard library alone: a contender may live in an environment without trapo_jax.
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
# No TF32 in any of them.
EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, script: Path, name: str, *arguments: str, python: str = sys.executable):
        self.name = name
        pipe = subprocess.PIPE
        # The workers share a GPU's memory.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **EXACT}
        self._process = subprocess.Popen(
            [python, str(script), name, *arguments],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=environment,
        )
        self.is_installed = self._reply() is not None

    def run(self, job: Job) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if reply is None:
            sys.exit(f"{self.name} ended with code {self._process.wait()} during {job['name']}")
        return reply

    def close(self) -> None:
        self._process.communicate()

    def _reply(self) -> dict[str, Any] | None:
        """The next one; None if the process has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def start_workers(
    script: Path, names: Sequence[str], *arguments: str, tunix_python: str
) -> list[Worker]:
    """A process for each contender; those that are not installed are left out, with a word."""
    started = [
        Worker(script, name, *arguments, python=tunix_python if name == "tunix" else sys.executable)
        for name in names
    ]
    for worker in started:
        if not worker.is_installed:
            print(f"{worker.name} is not installed here and left out")
    return [worker for worker in started if worker.is_installed]


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument(
        "--tunix-python", default=sys.executable, help="a Python where google-tunix is installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")


def take_turns(
    workers: Sequence[Worker],
    job: Job,
    repeats: int,
    track: Callable[..., Any],
) -> dict[str, list[dict]]:
    """Each contender's replies: one that warms up, then `repeats` measured ones. Their medians are printed at once, should
    what comes later fail."""
    able = [w for w in workers if w.name in job.get("only", [w.name])]
    replies: dict[str, list[dict]] = {worker.name: [] for worker in able}
    for worker in track([w for _ in range(1 + repeats) for w in able], description=job["name"]):
        replies[worker.name].append(worker.run(job))
    found = (f"{name} {median(done[1:], 'seconds'):.3f} s" for name, done in replies.items())
    print(f"{job['name']}: {', '.join(found)}", flush=True)
    return replies


def serve(contenders: Mapping[str, Callable[..., Any]]) -> int:
    """The child's end: `SCRIPT NAME ARGUMENTS...`, jobs in on standard input, replies out on standard output."""
    name, *arguments = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    try:
        contender = contenders[name](*arguments)
    except ModuleNotFoundError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 1
    print(json.dumps({"engine": name}), file=replies, flush=True)
    for line in sys.stdin:
        reply = contender.run(json.loads(line))
        reply["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(reply), file=replies, flush=True)
    return 0


def median(replies: Sequence[dict], name: str) -> float:
    return statistics.median(reply[name] for reply in replies)
