"""The rollout engine: requests in, completions out, whatever devices sample them.

A replica is one copy of the weights with slots of its own, on one device or on the `tp` devices of a row of the
mesh; of several hosts each samples on its own devices alone. The rollouts of a problem go to the same replica,
where its prompt and prefixes are run through the model once (`replica.py`).

What is drawn depends on the request alone (seed, step, problem, sample index, position): not on the replica, the
slot, its neighbours, the number of slots or the order of submission.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from trapo_jax.distributed.sharding import Rules, make_mesh, param_shardings
from trapo_jax.models import DecoderConfig, abstract_params
from trapo_jax.sampling.replica import EngineCounters, Replica, Waiting
from trapo_jax.types import (
    Completion,
    FinishReason,
    RolloutRequest,
    SamplingParams,
    UserError,
)

# Every replica holds all weights, split over its own devices only.
SAMPLING_RULES = Rules(width=None)


class RolloutEngine(Protocol):
    """What the training loop asks of a sampler. Token ids in, token ids and logprobs out."""

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        """Queues requests. `step` is part of their random keys; those of an earlier step go first."""
        ...

    def resume(
        self, unfinished: Sequence[Completion], *, step: int, params: SamplingParams
    ) -> None:
        """Queues what `release` has brought: sampling goes on behind the tokens that are there."""
        ...

    def poll(self) -> list[Completion]:
        """Decodes a segment at most, and returns what finished, which may be nothing."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether anything is queued or running."""
        ...

    def update_weights(self, params: Any, version: int) -> None:
        """Samples from these weights from now on. Nothing may be queued or running."""
        ...

    def release(self) -> list[Completion]:
        """Lets go of the weights and the cache until the next update: their memory is the training step's.

        Returns what is queued or running, with the tokens so far and `FinishReason.UNFINISHED`.
        """
        ...

    @property
    def num_idle_slots(self) -> int:
        """Rows that could be decoded beside those queued or running."""
        ...


class JaxEngine:
    """`RolloutEngine` in JAX, for the devices of this host.

    Args:
      config: the decoder's shape.
      num_slots: rows decoded at once by each replica.
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest prefix + completion, in tokens.
      segment_len: tokens decoded between two looks at the queue, at most.
      num_contexts: contexts whose keys and values each replica keeps for requests that begin alike.
      prefill_tokens: tokens of contexts run through the model at once, at most.
      eos_ids: token ids that end a completion.
      seed: the run's seed.
      with_truncation: requests may ask for top-p and top-k, which costs a sort of the vocabulary a token.
      mesh: with the axes `data`, `fsdp` and `tp`; every row of `tp` is a replica. One device if None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_slots: int,
        max_prompt_length: int,
        max_completion_length: int,
        segment_len: int,
        num_contexts: int,
        prefill_tokens: int,
        eos_ids: Sequence[int],
        seed: int,
        with_truncation: bool = False,
        mesh: Mesh | None = None,
    ):
        self._config = config
        self._max_prompt_length = max_prompt_length
        self._max_completion_length = max_completion_length
        self._with_truncation = with_truncation
        self._mesh = mesh or make_mesh(data=1, fsdp=1, tp=1, devices=jax.devices()[:1])
        shapes = abstract_params(config)
        self._shardings = param_shardings(shapes, self._mesh, SAMPLING_RULES)
        self._dtypes = dtypes = sampling_dtypes(shapes, config)
        cast = lambda params: jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
        self._cast: Any = jax.jit(cast, out_shardings=self._shardings)
        self._replicas = [
            Replica(
                config,
                Mesh(row, ("tp",), axis_types=(AxisType.Auto,)),
                num_slots=num_slots,
                max_prompt_length=max_prompt_length,
                max_completion_length=max_completion_length,
                segment_len=segment_len,
                num_contexts=num_contexts,
                prefill_tokens=prefill_tokens,
                eos_ids=eos_ids,
                seed=seed,
                with_truncation=with_truncation,
            )
            for row in _local_rows(self._mesh)
        ]
        self._home: dict[str, Replica] = {}  # of each problem
        self._threads = ThreadPoolExecutor(len(self._replicas), thread_name_prefix="replica")
        self.version = -1

    @property
    def counters(self) -> EngineCounters:
        return sum((replica.counters for replica in self._replicas), EngineCounters())

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far; constant after warm-up."""
        return self._cast._cache_size() + sum(replica.num_compiled for replica in self._replicas)

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values on each device, held from an update of the weights to `release`."""
        return self._replicas[0].cache_bytes

    def budget(self, request: RolloutRequest) -> int:
        """Tokens that may be sampled for a request."""
        return self._max_completion_length - request.prefix_len

    def update_weights(self, params: Any, version: int) -> None:
        if self.is_busy:
            raise RuntimeError("update_weights while completions are queued or running")
        for replica in self._replicas:
            replica.drop_weights()  # not three copies at once
        placed = self._place(params)
        for replica in self._replicas:
            replica.update_weights(jax.tree.map(lambda x, r=replica: _view(x, r.mesh), placed))
        self.version = version
        self._home.clear()

    def _place(self, params: Any) -> Any:
        """The weights as they are sampled from: split over `tp`, matrices in the dtype of the matmuls.

        Shared with the caller where they are so already.
        """
        is_there = lambda x, sharding, dtype: (
            isinstance(x, jax.Array)
            and x.dtype == dtype
            and x.sharding.is_equivalent_to(sharding, x.ndim)
        )
        if all(jax.tree.leaves(jax.tree.map(is_there, params, self._shardings, self._dtypes))):
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
        nothing = [Completion(r, (), (), FinishReason.UNFINISHED) for r in requests]
        self.resume(nothing, step=step, params=params)

    def resume(
        self, unfinished: Sequence[Completion], *, step: int, params: SamplingParams
    ) -> None:
        if (params.top_p < 1 or params.top_k) and not self._with_truncation:
            raise ValueError("top_p and top_k need an engine with_truncation")
        for so_far in unfinished:
            self._check(so_far)
        for so_far in unfinished:
            id_ = so_far.request.problem.id
            if id_ not in self._home:
                self._home[id_] = min(self._replicas, key=lambda replica: replica.num_requests)
            self._home[id_].submit(Waiting(so_far, step, params, self.budget(so_far.request)))

    def poll(self) -> list[Completion]:
        busy = [replica for replica in self._replicas if replica.is_busy]
        # In threads, as each waits for its devices.
        finished = self._threads.map(Replica.advance, busy)
        return [completion for of_replica in finished for completion in of_replica]

    def _check(self, so_far: Completion) -> None:
        request, problem = so_far.request, so_far.request.problem
        if len(problem.prompt_ids) > self._max_prompt_length:
            raise ValueError(
                f"problem {problem.id}: prompt of {len(problem.prompt_ids)} tokens exceeds "
                f"max_prompt_length {self._max_prompt_length}"
            )
        if not problem.prompt_ids:
            raise ValueError(f"problem {problem.id}: empty prompt")
        if so_far.finish_reason is not FinishReason.UNFINISHED:
            raise ValueError(f"problem {problem.id}: the completion is finished")
        if self.budget(request) <= len(so_far.token_ids):
            raise ValueError(f"problem {problem.id}: nothing to sample")


def _local_rows(mesh: Mesh) -> list[np.ndarray]:
    """The rows of devices along `tp` that belong to this process.

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
                    f"mesh.tp={len(row)}: more than the devices of a host; sampling splits the weights "
                    "within a host only"
                )
            rows.append(row)
    return rows


def sampling_dtypes(params: Any, config: DecoderConfig) -> Any:
    """What each of the weights is sampled in: matrices as the matmuls want them, the norms' scales as they are."""

    def dtype(path, x):
        return x.dtype if path[-1].key.endswith("norm") else config.dtype

    return jax.tree_util.tree_map_with_path(dtype, params)


def _view(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The same array as seen by the devices of a replica, which hold all of it between them."""
    assert isinstance(x.sharding, NamedSharding)  # from `_place`
    shards = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        x.shape, NamedSharding(mesh, x.sharding.spec), [shards[d] for d in mesh.devices.flat]
    )
