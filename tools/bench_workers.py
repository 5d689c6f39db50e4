"""What the benchmarks share: contenders in processes of their own, asked in turn, A B A B ...

Standard library alone: a contender may live in an environment without trapo_jax.
"""

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


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, script: Path, name: str, *arguments: str, python: str = sys.executable):
        self.name = name
        pipe = subprocess.PIPE
        # The workers share a GPU's memory.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
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


def take_turns(
    workers: Sequence[Worker],
    job: Job,
    repeats: int,
    track: Callable[..., Any],
) -> dict[str, list[dict]]:
    """Each contender's replies: one that warms up, then `repeats` measured ones."""
    able = [w for w in workers if w.is_installed and w.name in job.get("only", [w.name])]
    replies: dict[str, list[dict]] = {worker.name: [] for worker in able}
    for worker in track([w for _ in range(1 + repeats) for w in able], description=job["name"]):
        replies[worker.name].append(worker.run(job))
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
