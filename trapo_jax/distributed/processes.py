"""The processes of a job, one a host: how they find each other, and what they tell each other.

Every process runs the same program on the same config. Each samples and judges its share of a step's problems; then
all hold all rollouts, and train on one global batch. Process 0 alone writes logs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from trapo_jax.types import UserError

FEWEST_BYTES = (
    1024  # messages are padded to this, or twice, four times ...: a program for each length
)
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Finds the other processes of the job, if there are any; must come before anything else asks for devices.

    By `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` where they are set; on TPU pods, under
    SLURM and under MPI by what these provide. A job of one process opens no port.

    Raises:
      UserError: if only some of the three variables are set, or JAX finds no device.
    """
    given = {name: environment[name] for name in BY_HAND if name in environment}
    if given and len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise UserError(f"{', '.join(given)} set, but not {missing}; set all three or none")
    if given:
        address, num_processes, process_id = given.values()
        jax.distributed.initialize(address, int(num_processes), int(process_id))
    elif _num_processes(environment) > 1:
        jax.distributed.initialize()
    try:
        jax.devices()
    # The latter where the platform's plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        platforms = environment.get("JAX_PLATFORMS") or "any"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"JAX finds no device, JAX_PLATFORMS={platforms}{reason and f' ({reason})'}; unset it to "
            "take what there is"
        ) from error


def _num_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher has started, as far as its variables tell."""
    tpu_hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slurm = int(environment.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in environment else 1
    return max(len(tpu_hosts), slurm, int(environment.get("OMPI_COMM_WORLD_SIZE", 1)))


def is_main() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def my_share(items: Sequence[Any]) -> list[Any]:
    """What of a list this process works on: every n-th item."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather(value: Any) -> list[Any]:
    """Every process's value, by process. All must call this together; the values are what JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lens = multihost_utils.process_allgather(np.int64(len(message)))
    size = 1 << (max(FEWEST_BYTES, int(lens.max())) - 1).bit_length()
    padded = np.pad(message, (0, size - len(message)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, lens, strict=True)]


def gather_shares(mine: list[Any]) -> list[Any]:
    """The list whose shares (`my_share`) the processes hold."""
    shares = gather(mine)
    whole = [None] * sum(map(len, shares))
    for i, share in enumerate(shares):
        whole[i :: len(shares)] = share
    return whole


def from_main(value: Any) -> Any:
    """Process 0's value, for all."""
    return gather(value)[0]


def wait_for_all(name: str) -> None:
    """Returns once every process has come here; `name` says where this is."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Global arrays as NumPy's, whole on every process, one after the other."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
