"""Implements the rollout engine in JAX, on the devices of this host.

A replica is one copy of the weights with its own slots, on one device or on the `tp` devices in one row of the mesh.
If there are several hosts, each samples on its own devices. All rollouts of a problem are assigned to the same
replica, which prefills their prompt and prefixes only once.

The random numbers depend only on the request and the position (seed, step, problem, sample index, position), and not on
the replica, the slot, the other slots, the number of slots, or the order of submission.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from trapo_jax.distributed.sharding import Rules, make_mesh, param_shardings
from trapo_jax.models import DecoderConfig, abstract_params
from trapo_jax.sampling.engine import EngineMemory, EngineSpec, EngineStats
from trapo_jax.sampling.replica import Replica
from trapo_jax.sampling.slots import PendingRequest
from trapo_jax.types import Completion, FinishReason, RolloutRequest, SamplingParams, UserError

# Every replica has a full copy of the weights, sharded only over its own devices.
SAMPLING_RULES = Rules(width=None)


class JaxEngine:
    """A `RolloutEngine` in JAX.

    Top-p and top-k are available only if `spec.with_truncation` is set, since they require sorting the vocabulary for
    every token.

    Args:
      spec: the specification. Each `tp` row of `spec.mesh` becomes a replica.
    """

    def __init__(self, spec: EngineSpec):
        self._spec = spec
        mesh = spec.mesh or make_mesh(fsdp=1, tp=1, devices=jax.devices()[:1])
        shapes = abstract_params(spec.decoder)
        self._shardings = param_shardings(shapes, mesh, SAMPLING_RULES)
        self._dtypes = dtypes = sampling_dtypes(shapes, spec.decoder)
        cast = lambda params: jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
        self._cast: Any = jax.jit(cast, out_shardings=self._shardings)
        self._replicas = [
            Replica(spec, Mesh(row, ("tp",), axis_types=(AxisType.Auto,)))
            for row in _local_rows(mesh)
        ]
        self._replica_of: dict[str, Replica] = {}  # keyed by problem id
        self._threads = ThreadPoolExecutor(len(self._replicas), thread_name_prefix="replica")

    def stats(self) -> EngineStats:
        return sum((replica.stats for replica in self._replicas), EngineStats())

    def memory(self) -> EngineMemory:
        return EngineMemory(self._replicas[0].kv_cache_bytes)

    @property
    def num_compiled(self) -> int:
        """Number of programs compiled so far; constant after warm-up."""
        return self._cast._cache_size() + sum(replica.num_compiled for replica in self._replicas)

    def max_tokens(self, request: RolloutRequest) -> int:
        """Maximum number of tokens to sample for a request."""
        return self._spec.max_completion_length - request.prefix_len

    def update_weights(self, params: Any) -> None:
        if self.is_busy:
            raise RuntimeError("update_weights called while requests are queued or running")
        for replica in self._replicas:
            replica.drop_weights()  # otherwise, three copies of the weights would be in memory
        placed = self._place(params)
        for replica in self._replicas:
            replica.update_weights(jax.tree.map(lambda x, r=replica: _replica_view(x, r), placed))
        self._replica_of.clear()

    def _place(self, params: Any) -> Any:
        """Shards the weights over `tp` and casts them to `sampling_dtypes`.

        Weights that already have this sharding and dtype are shared with the caller.
        """
        is_placed = lambda x, sharding, dtype: (
            isinstance(x, jax.Array)
            and x.dtype == dtype
            and x.sharding.is_equivalent_to(sharding, x.ndim)
        )
        if all(jax.tree.leaves(jax.tree.map(is_placed, params, self._shardings, self._dtypes))):
            return jax.device_put(params, self._shardings)
        return self._cast(params)

    def release(self) -> list[Completion]:
        return [completion for replica in self._replicas for completion in replica.release()]

    @property
    def is_busy(self) -> bool:
        return any(replica.is_busy for replica in self._replicas)

    @property
    def num_idle_slots(self) -> int:
        return sum(replica.num_idle_slots for replica in self._replicas)

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        empty = [Completion(r, (), (), FinishReason.UNFINISHED) for r in requests]
        self.resume(empty, step=step, params=params)

    def resume(self, partial: Sequence[Completion], *, step: int, params: SamplingParams) -> None:
        if (params.top_p < 1 or params.top_k) and not self._spec.with_truncation:
            raise ValueError("top_p and top_k require an engine built with with_truncation=True")
        for completion in partial:
            self._check(completion)
        for completion in partial:
            request = completion.request
            replica = self._choose_replica(request.problem.id)
            replica.submit(PendingRequest(completion, step, params, self.max_tokens(request)))

    def _choose_replica(self, problem_id: str) -> Replica:
        """Returns the replica with this problem's other rollouts, or the least busy replica if there are none."""
        if problem_id not in self._replica_of:
            least_busy = min(self._replicas, key=lambda replica: replica.num_requests)
            self._replica_of[problem_id] = least_busy
        return self._replica_of[problem_id]

    def step(self) -> list[Completion]:
        busy = [replica for replica in self._replicas if replica.is_busy]
        # Threads let the replicas run concurrently: each thread waits for the devices of one replica.
        finished = self._threads.map(Replica.step, busy)
        return [completion for of_replica in finished for completion in of_replica]

    def _check(self, partial: Completion) -> None:
        request, problem = partial.request, partial.request.problem
        if len(problem.prompt_ids) > self._spec.max_prompt_length:
            raise ValueError(
                f"problem {problem.id}: the prompt of {len(problem.prompt_ids)} tokens exceeds "
                f"max_prompt_length {self._spec.max_prompt_length}"
            )
        if not problem.prompt_ids:
            raise ValueError(f"problem {problem.id}: the prompt is empty")
        if partial.finish_reason is not FinishReason.UNFINISHED:
            raise ValueError(f"problem {problem.id}: the completion is already finished")
        if self.max_tokens(request) <= len(partial.token_ids):
            raise ValueError(f"problem {problem.id}: there is nothing to sample")


def sampling_dtypes(params: Any, config: DecoderConfig) -> Any:
    """Returns the dtype of each parameter for sampling: `config.dtype`, except for normalization scales."""

    def dtype(path, x):
        return x.dtype if path[-1].key.endswith("norm") else config.dtype

    return jax.tree_util.tree_map_with_path(dtype, params)


def _local_rows(mesh: Mesh) -> list[np.ndarray]:
    """Returns the rows of devices along `tp` that belong to this process.

    Raises:
      UserError: if a row spans processes.
    """
    here = jax.process_index()
    rows = []
    for row in mesh.devices.reshape(-1, mesh.shape["tp"]):
        processes = {device.process_index for device in row}
        if here in processes:
            if len(processes) > 1:
                raise UserError(
                    f"mesh.tp={len(row)} exceeds the number of devices per host, and sampling shards the weights only "
                    "within a host; reduce mesh.tp"
                )
            rows.append(row)
    return rows


def _replica_view(x: jax.Array, replica: Replica) -> jax.Array:
    """Returns a view of the array on the devices of one replica, which together hold all of its shards."""
    assert isinstance(x.sharding, NamedSharding)  # as set by `_place`
    shards = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        x.shape,
        NamedSharding(replica.mesh, x.sharding.spec),
        [shards[device] for device in replica.mesh.devices.flat],
    )
