"""Defines mistakes in commands, files and environments. A run must reject each of them with one error line."""

import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fault_harness import jobs
from fault_harness.faults import Bench, Fault
from fault_harness.jobs import EXIT_FAILED, EXIT_USER_ERROR, Failure

HUGE = 10**9


class Refusal(NamedTuple):
    """A mistake that a run must reject.

    Attributes:
      name: a short description of the mistake.
      arguments: arguments of the train command; `{folder}` is replaced by the folder that contains `files`.
      says: text that the error line must contain.
      files: contents of files to create, keyed by name; None creates a named pipe.
      environment: environment variables to set.
      code: the expected exit code.
    """

    name: str
    arguments: Sequence[str]
    says: str
    files: Mapping[str, str | None] = MappingProxyType({})
    environment: Mapping[str, str] = MappingProxyType({})
    code: int = EXIT_USER_ERROR


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
OTHERS = {"SLURM_PROCID": "0", "SLURM_NTASKS": "two"}
REFUSALS = (
    Refusal("a billion slots", [f"sampling.num_slots={HUGE}"], "sampling.num_slots"),
    Refusal(
        "a billion tokens", [f"sampling.max_completion_length={HUGE}"], "max_completion_length"
    ),
    Refusal("a billion rows", [f"train.per_device_rows={HUGE}"], "train.per_device_rows"),
    Refusal("a learning rate beyond float32", ["train.learning_rate=1e300"], "learning_rate"),
    Refusal("the same split twice", ["evaluation.splits=[test,test]"], "evaluation.splits"),
    Refusal(
        "nothing learned",
        ["train.max_skipped_steps=2", "train.learning_rate=1e30"],
        "step",
        code=EXIT_FAILED,
    ),
    Refusal("YAML aliases", ["--config", "{folder}/a.yaml"], "a.yaml", {"a.yaml": ALIASES}),
    Refusal("deep YAML", ["--config", "{folder}/a.yaml"], "a.yaml", {"a.yaml": "[" * 100_000}),
    Refusal("a pipe as config", ["--config", "{folder}/a.yaml"], "a.yaml", {"a.yaml": None}),
    Refusal(
        "a pipe as data",
        [
            "data.train_files=[{folder}/a.jsonl]",
            "model.path=card_shuffles_tiny",
            "rewards.functions=math",
        ],
        "a.jsonl",
        {"a.jsonl": None},
    ),
    Refusal("a malformed SLURM variable", [], "SLURM_NTASKS", environment=OTHERS),
    Refusal("a malformed MPI variable", [], "OMPI", environment={"OMPI_COMM_WORLD_SIZE": "b"}),
    Refusal("a malformed JAX variable", [], "JAX_ENABLE_X64", environment={"JAX_ENABLE_X64": "b"}),
)


def refusal(mistake: Refusal) -> Fault:
    """Returns a fault that makes a mistake and checks that the run rejects it."""

    def strike(bench: Bench, run: Path, rng: random.Random) -> str:
        del bench, rng
        for name, content in mistake.files.items():
            path = run.with_name(name)
            os.mkfifo(path) if content is None else path.write_text(content)
        arguments = [argument.format(folder=run.parent) for argument in mistake.arguments]
        process = jobs.start(run, [*jobs.JOB, *arguments], environment=mistake.environment)
        line = jobs.check_refusal(jobs.finish(process), mistake.code)
        if mistake.says not in line:
            raise Failure(f"the error line does not contain {mistake.says!r}: {line}")
        return line

    return Fault(mistake.name, strike, is_compared=False)


def two_seeds(bench: Bench, run: Path, rng: random.Random) -> str:
    """Starts a job of two processes with different seeds. Both processes must exit with an error."""
    del bench, rng
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        jobs.start(run, (*jobs.JOB, f"seed={i}"), environment=job | {"JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]
    lines = [jobs.check_refusal(jobs.finish(x), EXIT_USER_ERROR) for x in processes]
    if not all("seed=" in line for line in lines):
        raise Failure(" / ".join(lines))
    return lines[0]


def ascii_terminal(bench: Bench, run: Path, rng: random.Random) -> str:
    """Trains with an output encoding that cannot represent all printed characters."""
    del bench, rng
    jobs.complete(run, environment={"PYTHONIOENCODING": "ascii"})
    return "printed"


def refusals() -> Sequence[Fault]:
    """Returns one fault for each mistake, and one for a terminal that supports only ASCII."""
    two = Fault("two processes with two seeds", two_seeds, is_compared=False)
    return [*map(refusal, REFUSALS), two, Fault("an ASCII terminal", ascii_terminal)]
