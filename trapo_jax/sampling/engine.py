"""The rollout engine: fixed slots, refilled as rows finish.

Requests wait in a queue. Whenever slots are free they are admitted: each *distinct* context (prompt and
expert prefix) is run through the model once and its keys and values are copied to every slot that needs
them. Then a segment of tokens is decoded for all slots at once, finished rows leave, and so on.

The last context token is not prefilled: it is the first token fed to the decode step, so that every token is
sampled by the same code. What is drawn depends on the request alone (seed, step, problem, sample
index, position): not on the slot, its neighbours, the number of slots or the order of submission.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from trapo_jax.models import DecoderConfig, KVCache, apply_decoder, unembedding
from trapo_jax.sampling.draw import draw_tokens, request_key
from trapo_jax.types import Completion, FinishReason, RolloutRequest, SamplingParams

PREFILL_ROWS = 8  # distinct contexts run through the model at once
SHORTEST_BUCKET = 16  # contexts are padded to this, or twice, four times ... this


class RolloutEngine(Protocol):
    """What the training loop asks of a sampler. Token ids in, token ids and logprobs out."""

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        """Queues requests. `step` is part of their random keys."""
        ...

    def poll(self) -> list[Completion]:
        """Works a while and returns what finished; empty only if nothing is queued or running."""
        ...

    def update_weights(self, params: Any, version: int) -> None:
        """Samples from these weights from now on. Nothing may be queued or running."""
        ...


class _Admitted(NamedTuple):
    """A request that gets a slot; on the device, a column of them."""

    slot: Any
    row: Any  # of the prefilled contexts
    max_new: Any
    temperature: Any
    step: Any
    problem_key: Any
    sample_index: Any


_ADMITTED_DTYPES = (np.int32,) * 3 + (np.float32,) + (np.uint32,) * 3


class _Slots(NamedTuple):
    """Device state, one entry a slot. `contexts` and `new` count tokens."""

    cache: KVCache
    cached_lens: jax.Array  # int32 [S]
    last_token: jax.Array  # int32 [S], to be fed next; its position is cached_lens
    keys: jax.Array  # random keys [S]
    temperature: jax.Array  # float32 [S]
    max_new: jax.Array  # int32 [S]
    num_new: jax.Array  # int32 [S]
    active: jax.Array  # bool [S]
    tokens: jax.Array  # int32 [S, R] sampled so far
    logprobs: jax.Array  # float32 [S, R]


class JaxEngine:
    """`RolloutEngine` in JAX, for one host.

    Args:
      config: the decoder's shape.
      num_slots: rows decoded at once.
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest prefix + completion, in tokens.
      segment_len: tokens decoded between two looks at the queue.
      eos_ids: token ids that end a completion.
      seed: the run's seed.
      sharding: where the slots lie; the default device if None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_slots: int,
        max_prompt_length: int,
        max_completion_length: int,
        segment_len: int,
        eos_ids: Sequence[int],
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self._max_prompt_length = max_prompt_length
        self._max_completion_length = max_completion_length
        self._seed = np.uint32(seed)
        self._waiting: collections.deque[tuple[RolloutRequest, int, SamplingParams]] = (
            collections.deque()
        )
        self._running: dict[int, RolloutRequest] = {}
        self._params: Any = None
        self.version = -1
        slots = _empty_slots(
            config,
            num_slots,
            cache_len=max_prompt_length + max_completion_length,
            max_new=max_completion_length,
        )
        self._slots = jax.device_put(slots, sharding)
        self._free = list(range(num_slots))[::-1]
        self._admit = jax.jit(functools.partial(_admit, config), donate_argnums=1)
        self._decode = jax.jit(
            functools.partial(_decode, config, segment_len, tuple(eos_ids)), donate_argnums=1
        )
        self._eos_ids = frozenset(eos_ids)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far; constant after warm-up."""
        programs: list[Any] = [self._admit, self._decode]
        return sum(program._cache_size() for program in programs)

    def update_weights(self, params: Any, version: int) -> None:
        if self._waiting or self._running:
            raise RuntimeError("update_weights while completions are queued or running")
        self._params, self.version = params, version

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        for request in requests:
            if len(request.problem.prompt_ids) > self._max_prompt_length:
                raise ValueError(
                    f"problem {request.problem.id}: prompt of {len(request.problem.prompt_ids)} "
                    f"tokens exceeds max_prompt_length {self._max_prompt_length}"
                )
            if not request.problem.prompt_ids:
                raise ValueError(f"problem {request.problem.id}: empty prompt")
            if self._budget(request) < 1:
                raise ValueError(f"problem {request.problem.id}: nothing to sample")
            self._waiting.append((request, step, params))

    def poll(self) -> list[Completion]:
        while self._waiting or self._running:
            while self._waiting and self._free:
                self._admit_wave()
            self._slots = self._decode(self._params, self._slots)
            active, num_new = jax.device_get((self._slots.active, self._slots.num_new))
            finished = [slot for slot in self._running if not active[slot]]
            if finished:
                tokens, logprobs = jax.device_get((self._slots.tokens, self._slots.logprobs))
                return [
                    self._leave(slot, tokens[slot, :length], logprobs[slot, :length])
                    for slot in finished
                    for length in [num_new[slot]]
                ]
        return []

    def _budget(self, request: RolloutRequest) -> int:
        return self._max_completion_length - request.prefix_len

    def _leave(self, slot: int, tokens: np.ndarray, logprobs: np.ndarray) -> Completion:
        request = self._running.pop(slot)
        self._free.append(slot)
        stopped = int(tokens[-1]) in self._eos_ids
        return Completion(
            request=request,
            token_ids=tuple(tokens.tolist()),
            logprobs=tuple(logprobs.tolist()),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )

    def _admit_wave(self) -> None:
        """Admits waiting requests: as many as there are free slots, from up to `PREFILL_ROWS`
        distinct contexts. Shapes are fixed but for the bucketed context length."""
        contexts: dict[tuple[int, ...], int] = {}
        admitted: list[_Admitted] = []
        while self._waiting and self._free:
            request, step, params = self._waiting[0]
            context = request.problem.prompt_ids + request.prefix_ids
            if context not in contexts and len(contexts) == PREFILL_ROWS:
                break
            self._waiting.popleft()
            slot = self._free.pop()
            self._running[slot] = request
            admitted.append(
                _Admitted(
                    slot=slot,
                    row=contexts.setdefault(context, len(contexts)),
                    max_new=self._budget(request),
                    temperature=params.temperature,
                    step=step,
                    problem_key=request.problem.key,
                    sample_index=request.sample_index,
                )
            )
        token_ids = np.zeros((PREFILL_ROWS, _context_bucket(max(map(len, contexts)))), np.int32)
        lens = np.ones(PREFILL_ROWS, np.int32)
        for context, row in contexts.items():
            token_ids[row, : len(context)] = context
            lens[row] = len(context)
        num_slots = self._slots.active.shape[0]
        nobody = _Admitted(num_slots, 0, 1, 1.0, 0, 0, 0)  # its slot is out of range: dropped
        admitted += [nobody] * (num_slots - len(admitted))
        columns = (
            np.asarray(column, dtype)
            for column, dtype in zip(zip(*admitted, strict=True), _ADMITTED_DTYPES, strict=True)
        )
        self._slots = self._admit(
            self._params, self._slots, token_ids, lens, self._seed, _Admitted(*columns)
        )


def _empty_slots(config: DecoderConfig, num_slots: int, *, cache_len: int, max_new: int) -> _Slots:
    rows = (config.num_layers, num_slots, config.num_kv_heads)
    zeros = functools.partial(jnp.zeros, num_slots)
    return _Slots(
        cache=KVCache(
            keys=jnp.zeros((*rows, config.head_dim, cache_len), config.dtype),
            values=jnp.zeros((*rows, cache_len, config.head_dim), config.dtype),
        ),
        cached_lens=zeros(jnp.int32),
        last_token=zeros(jnp.int32),
        keys=jax.random.split(jax.random.key(0), num_slots),
        temperature=zeros(jnp.float32),
        max_new=zeros(jnp.int32),
        num_new=zeros(jnp.int32),
        active=zeros(bool),
        tokens=jnp.zeros((num_slots, max_new), jnp.int32),
        logprobs=jnp.zeros((num_slots, max_new), jnp.float32),
    )


def _admit(
    config: DecoderConfig, params, slots: _Slots, token_ids_UT, lens_U, seed, admitted: _Admitted
) -> _Slots:
    """Prefills U distinct contexts and starts the admitted rows from them."""
    num_contexts, context_len = token_ids_UT.shape
    positions = jnp.broadcast_to(jnp.arange(context_len), token_ids_UT.shape)
    segment_ids = (positions < lens_U[:, None]).astype(jnp.int32)
    _, prefilled = apply_decoder(config, params, token_ids_UT, positions, segment_ids)
    copied = min(context_len, slots.cache.keys.shape[-1])  # the rest is pad
    new_keys, new_values = (new[:, admitted.row, :copied] for new in prefilled)  # [L, A, T, K, H]
    cache = KVCache(
        slots.cache.keys.at[:, admitted.slot, :, :, :copied].set(
            new_keys.transpose(0, 1, 3, 4, 2), mode="drop"
        ),
        slots.cache.values.at[:, admitted.slot, :, :copied].set(
            new_values.transpose(0, 1, 3, 2, 4), mode="drop"
        ),
    )
    last_token_U = token_ids_UT[jnp.arange(num_contexts), lens_U - 1]
    keys = jax.vmap(request_key, in_axes=(None, 0, 0, 0))(
        seed, admitted.step, admitted.problem_key, admitted.sample_index
    )
    put = lambda old, new: old.at[admitted.slot].set(new, mode="drop")
    return slots._replace(
        cache=cache,
        cached_lens=put(slots.cached_lens, lens_U[admitted.row] - 1),
        last_token=put(slots.last_token, last_token_U[admitted.row]),
        keys=put(slots.keys, keys),
        temperature=put(slots.temperature, admitted.temperature),
        max_new=put(slots.max_new, admitted.max_new),
        num_new=put(slots.num_new, 0),
        active=put(slots.active, True),
    )


def _decode(config, segment_len: int, eos_ids: tuple[int, ...], params, slots: _Slots) -> _Slots:
    """Up to `segment_len` tokens for every active slot; stops early when none is active."""
    output_projection = unembedding(params).astype(config.dtype)
    every_slot = jnp.arange(slots.active.shape[0])

    def one_token(carry):
        count, s = carry
        hidden, new = apply_decoder(
            config,
            params,
            s.last_token[:, None],
            s.cached_lens[:, None],
            cache=s.cache,
            cached_lens_S=s.cached_lens,
        )
        logits = jnp.matmul(hidden[:, 0], output_projection, preferred_element_type=jnp.float32)
        token, logprob = draw_tokens(s.keys, s.cached_lens + 1, logits, s.temperature)
        # Inactive slots write out of range, which drops it.
        where_cached = jnp.where(s.active, s.cached_lens, s.cache.keys.shape[-1])
        where_new = jnp.where(s.active, s.num_new, s.tokens.shape[1])
        new_keys, new_values = (entry[:, :, 0].swapaxes(0, 1) for entry in new)  # [S, L, K, H]
        cache = KVCache(
            s.cache.keys.at[:, every_slot, :, :, where_cached].set(new_keys, mode="drop"),
            s.cache.values.at[:, every_slot, :, where_cached].set(new_values, mode="drop"),
        )
        num_new = s.num_new + s.active
        is_eos = jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
        return count + 1, s._replace(
            cache=cache,
            cached_lens=s.cached_lens + s.active,
            last_token=jnp.where(s.active, token, s.last_token),
            num_new=num_new,
            active=s.active & ~is_eos & (num_new < s.max_new),
            tokens=s.tokens.at[every_slot, where_new].set(token, mode="drop"),
            logprobs=s.logprobs.at[every_slot, where_new].set(logprob, mode="drop"),
        )

    def unfinished(carry):
        count, s = carry
        return (count < segment_len) & jnp.any(s.active)

    return jax.lax.while_loop(unfinished, one_token, (0, slots))[1]


def _context_bucket(length: int) -> int:
    """16, 32, 64 ...: few shapes, hence few programs."""
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
