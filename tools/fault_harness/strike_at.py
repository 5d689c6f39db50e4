"""Trains in this process, and makes a fault strike at a named moment.

    python strike_at.py MOMENT NUMBER ACTION FIELD=VALUE ...

MOMENT is a key of `MOMENTS`, which maps it to a function. The fault strikes just before the NUMBER-th call of this
function. ACTION is `kill` (kill this process), `clock` (set the clock back by an hour), or a path (write a file there
until its disk is full).
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTS = {
    "a record": "trapo_jax.runs.loggers:RunLog.metrics",
    "samples": "trapo_jax.runs.loggers:RunLog.samples",
    "an evaluation": "trapo_jax.runs.loggers:RunLog.evaluation",
    "a save": "trapo_jax.runs.checkpoints:CheckpointStore.save",
    "Orbax's save": "trapo_jax.runs.checkpoints:ocp.save_checkpointables",
    "a commit": "trapo_jax.runs.checkpoints:CheckpointStore._commit",
    "a manifest": "trapo_jax.runs.checkpoints:write_manifest",
    "a flush": "trapo_jax.runs.manifests:sync",
    "a clean-up": "trapo_jax.runs.checkpoints:CheckpointStore.clean",
    "a deletion": "trapo_jax.runs.checkpoints:_delete_listed",
    "an update": "trapo_jax.training.learner:Learner.update",
    "the export": "trapo_jax.train:export_model",
    "the report": "trapo_jax.runs.run:write_report_of_run",
    "the summary": "trapo_jax.runs.run:write_summary",
}


def find(moment: str) -> tuple[Any, str]:
    """Returns the module or class that contains a moment's function, and the function's name."""
    module, _, path = MOMENTS[moment].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def strike_at(moment: str, number: int, action: Callable[[], None]) -> None:
    """Wraps a moment's function so that `action` is called just before the `number`-th call of the function."""
    owner, name = find(moment)
    function, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    def strike_first(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, strike_first)


def action_of(name: str) -> Callable[[], None]:
    """Returns the function that performs an action; see the module docstring."""
    if name == "kill":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if name == "clock":
        now = time.time
        return lambda: setattr(time, "time", lambda: now() - 3600)
    return lambda: fill(Path(name))


def fill(path: Path) -> None:
    """Appends to a file until its disk is full."""
    for size in (2**20, 4096, 1):
        try:
            with open(path, "ab", buffering=0) as file:
                while True:
                    file.write(bytes(size))
        except OSError:
            continue


if __name__ == "__main__":
    from trapo_jax.runs.command_line import run_and_exit
    from trapo_jax.train import main

    strike_at(sys.argv[1], int(sys.argv[2]), action_of(sys.argv[3]))
    arguments = sys.argv[4:]
    run_and_exit(lambda: main(arguments))
