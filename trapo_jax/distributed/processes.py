"""Implements communication between the processes of a job (one per host), which `launch` connects to each other.

Every process runs the same program with the same config. Each process samples and grades its share of a step's
problems. The rollouts are then gathered on all processes, which train on one global batch. Only process 0 writes logs.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # JAX has no public access to its key-value store.
from jax.experimental import multihost_utils

from trapo_jax.types import Interrupted

T = TypeVar("T")

# Messages are padded to this size times a power of 2, because a program is compiled for each size.
MIN_MESSAGE_BYTES = 1024
POLL_SECS = 1.0


def is_main() -> bool:
    """Returns whether this process writes the logs."""
    return jax.process_index() == 0


def my_share(items: Sequence[Any]) -> list[Any]:
    """Returns this process's share of a list: every n-th item, where n is the number of processes."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather(value: Any) -> list[Any]:
    """Returns the JSON-serializable values of all processes, in process order. All processes must call this."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lens = multihost_utils.process_allgather(np.int64(len(message)))
    size = 1 << (max(MIN_MESSAGE_BYTES, int(lens.max())) - 1).bit_length()
    padded = np.pad(message, (0, size - len(message)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, lens, strict=True)]


def gather_shares(mine: list[Any]) -> list[Any]:
    """Returns the whole list, reassembled from the shares of all processes (see `my_share`)."""
    shares = gather(mine)
    whole = [None] * sum(map(len, shares))
    for i, share in enumerate(shares):
        whole[i :: len(shares)] = share
    return whole


def from_main(decide: Callable[[], T]) -> T:
    """Calls `decide` on process 0, and returns its JSON-serializable result on all processes.

    All processes must call this function. An error on process 0 also ends the others; see `failures.fail_together`.
    """
    return gather(decide() if is_main() else None)[0]


def interrupt_together(work: Callable[[], T]) -> T:
    """Calls `work` and returns its result, or raises `Interrupted` if `work` is interrupted in any process.

    All processes must call this function. It prevents them from waiting for an interrupted process in the next
    collective operation.
    """
    try:
        result, is_interrupted = work(), False
    except Interrupted:
        result, is_interrupted = None, True
    if any(gather(is_interrupted)):
        raise Interrupted
    return result  # pyright: ignore[reportReturnType]


class SharedFlag:
    """A flag that any process can set. The others see it within `POLL_SECS`, without a collective operation.

    Args:
      name: name of the flag, unique within the job.
    """

    def __init__(self, name: str):
        self._key = f"trapo_jax/{name}/{jax.process_index()}"
        self._client = distributed.global_state.client  # None if there is only one process.
        self._is_set = self._was_set_here = False
        self._last_poll = float("-inf")

    def set(self) -> None:
        if not self._was_set_here:
            self._is_set = self._was_set_here = True
            if self._client is not None:
                self._client.key_value_set(self._key, "")

    @property
    def is_set(self) -> bool:
        now = time.monotonic()
        if not self._is_set and self._client is not None and now - self._last_poll >= POLL_SECS:
            self._last_poll = now
            self._is_set = bool(self._client.key_value_dir_get(os.path.dirname(self._key)))
        return self._is_set

    def close(self) -> None:
        """Clears the flag if this process has set it. All processes must have seen the flag by then."""
        if self._was_set_here and self._client is not None:
            self._client.key_value_delete(self._key)


def wait_for_all(name: str) -> None:
    """Waits until all processes have reached the barrier `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Returns global arrays as complete NumPy arrays on every process. Arrays are gathered one at a time."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
