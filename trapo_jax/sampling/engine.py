"""The rollout engine: fixed slots, refilled as rows finish.

Requests wait in a queue. Whenever slots are free they are admitted: a context (prompt and expert prefix) is run
through the model once, as far as no context before it began alike (`contexts.py`), and its keys and values are
copied to every slot that starts there. Then a segment of tokens is decoded for all slots at once, finished rows
leave, and so on. A segment ends early once enough rows are done, as others may wait for their places; when none do,
the rows at work move to the lowest slots, so that fewer are computed.

The last context token is not prefilled: it is the first token fed to the decode step, so that every token is
sampled by the same code. What is drawn depends on the request alone (seed, step, problem, sample
index, position): not on the slot, its neighbours, the number of slots or the order of submission.
"""

import collections
import dataclasses
import functools
import heapq
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from trapo_jax.models import DecoderConfig, KVCache, apply_decoder, unembedding
from trapo_jax.sampling.contexts import (
    ContextTable,
    Piece,
    batches,
    copy_rows,
    empty_cache,
    power_of_2,
    prefill,
)
from trapo_jax.sampling.draw import draw_tokens, request_key
from trapo_jax.types import Completion, FinishReason, RolloutRequest, SamplingParams

SHORTEST_COPY = 16  # a context is copied to a slot in this many positions, or twice, four times ...
# A decode segment computes so many slots, and looks at so many positions of the cache, or twice, four times ...
FEWEST_SLOTS, SHORTEST_VIEW = 2, 256
# A segment ends early once one slot in so many is done: others may wait for its place.
SLOTS_A_LEAVE = 16
FETCHED_SLOTS = 8


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


class _Starting(NamedTuple):
    """A request that gets a slot; on the device, a column of them."""

    slot: Any
    cached_len: Any
    last_token: Any
    max_new: Any
    temperature: Any
    top_p: Any
    top_k: Any
    step: Any
    problem_key: Any
    sample_index: Any


_STARTING_DTYPES = (np.int32,) * 4 + (np.float32,) * 2 + (np.int32,) + (np.uint32,) * 3


class _Slots(NamedTuple):
    """Device state, one entry a slot. `new` counts tokens."""

    cache: KVCache
    cached_lens: jax.Array  # int32 [S]
    last_token: jax.Array  # int32 [S], to be fed next; its position is cached_lens
    keys: jax.Array  # random keys [S]
    temperature: jax.Array  # float32 [S]
    top_p: jax.Array  # float32 [S]
    top_k: jax.Array  # int32 [S]
    max_new: jax.Array  # int32 [S]
    num_new: jax.Array  # int32 [S]
    active: jax.Array  # bool [S]
    tokens: jax.Array  # int32 [S, R] sampled so far
    logprobs: jax.Array  # float32 [S, R]


@dataclasses.dataclass(frozen=True)
class EngineCounters:
    """What an engine has done so far.

    Attributes:
      prefilled_tokens: tokens of contexts run through the model.
      decoded_tokens: tokens sampled.
      slot_tokens: tokens that as many decode steps could have sampled with every slot they computed active.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    slot_tokens: int = 0

    @property
    def slot_utilization(self) -> float:
        return self.decoded_tokens / max(1, self.slot_tokens)

    def __add__(self, other: "EngineCounters") -> "EngineCounters":
        return self._by_field(operator.add, other)

    def __sub__(self, other: "EngineCounters") -> "EngineCounters":
        return self._by_field(operator.sub, other)

    def _by_field(self, operation: Callable[[int, int], int], other: "EngineCounters"):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return EngineCounters(*(operation(a, b) for a, b in pairs))


class JaxEngine:
    """`RolloutEngine` in JAX, for one host.

    Args:
      config: the decoder's shape.
      num_slots: rows decoded at once.
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest prefix + completion, in tokens.
      segment_len: tokens decoded between two looks at the queue, at most.
      num_contexts: contexts whose keys and values are kept for requests that begin alike.
      prefill_tokens: tokens of contexts run through the model at once, at most.
      eos_ids: token ids that end a completion.
      seed: the run's seed.
      with_truncation: requests may ask for top-p and top-k, which costs a sort of the vocabulary a token.
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
        num_contexts: int,
        prefill_tokens: int,
        eos_ids: Sequence[int],
        seed: int,
        with_truncation: bool = False,
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
        self.counters = EngineCounters()
        self._prefill_tokens = prefill_tokens
        self._segment_len = segment_len
        self._with_truncation = with_truncation
        self._table = ContextTable(num_contexts)
        capacity = max_prompt_length + max_completion_length
        contexts = empty_cache(config, num_contexts, capacity)
        slots = _empty_slots(config, num_slots, cache_len=capacity, max_new=max_completion_length)
        self._contexts, self._slots = jax.device_put((contexts, slots), sharding)
        self._cached_lens = np.zeros(num_slots, np.int32)  # as on the device
        self._free = list(range(num_slots))  # a heap: the lowest is taken first
        self._prefill = jax.jit(functools.partial(prefill, config), donate_argnums=1)
        self._copy_context = jax.jit(_copy_context, donate_argnums=0)
        self._move = jax.jit(_move, donate_argnums=0)
        self._rows = jax.jit(_rows)
        self._start = jax.jit(_start, static_argnames="copied_len", donate_argnums=0)
        self._decode = jax.jit(
            functools.partial(_decode, config, segment_len, tuple(eos_ids), with_truncation),
            static_argnames=("num_slots", "view_len"),
            donate_argnums=1,
        )
        self._eos_ids = frozenset(eos_ids)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far; constant after warm-up."""
        programs: list[Any] = [
            self._prefill,
            self._copy_context,
            self._start,
            self._move,
            self._decode,
            self._rows,
        ]
        return sum(program._cache_size() for program in programs)

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values, over all devices' copies counted once; allocated at the start."""
        return sum(x.nbytes for x in jax.tree.leaves((self._contexts, self._slots.cache)))

    def update_weights(self, params: Any, version: int) -> None:
        if self._waiting or self._running:
            raise RuntimeError("update_weights while completions are queued or running")
        self._params, self.version = params, version
        self._table.clear()

    def submit(
        self, requests: Sequence[RolloutRequest], *, step: int, params: SamplingParams
    ) -> None:
        if (params.top_p < 1 or params.top_k) and not self._with_truncation:
            raise ValueError("top_p and top_k need an engine with_truncation")
        for request in requests:
            if len(request.problem.prompt_ids) > self._max_prompt_length:
                raise ValueError(
                    f"problem {request.problem.id}: prompt of {len(request.problem.prompt_ids)} "
                    f"tokens exceeds max_prompt_length {self._max_prompt_length}"
                )
            if not request.problem.prompt_ids:
                raise ValueError(f"problem {request.problem.id}: empty prompt")
            if self.budget(request) < 1:
                raise ValueError(f"problem {request.problem.id}: nothing to sample")
            self._waiting.append((request, step, params))

    def poll(self) -> list[Completion]:
        while self._waiting or self._running:
            while self._waiting and self._free:
                self._admit_wave()
            self._close_ranks()
            extent = self._extent()
            self._slots, num_steps, num_tokens = self._decode(self._params, self._slots, **extent)
            s = self._slots
            active, num_new, cached_lens, num_steps, num_tokens = jax.device_get(
                (s.active, s.num_new, s.cached_lens, num_steps, num_tokens)
            )
            self._cached_lens = np.array(cached_lens)
            self.counters += EngineCounters(
                decoded_tokens=int(num_tokens),
                slot_tokens=int(num_steps) * extent["num_slots"],
            )
            finished = [slot for slot in self._running if not active[slot]]
            if finished:
                return self._leave(finished, num_new)
        return []

    def _extent(self) -> dict[str, int]:
        """The slots at work, and the positions of the cache that the next segment can reach."""
        longest = max(int(self._cached_lens[slot]) for slot in self._running) + self._segment_len
        num_slots = _rounded_slots(max(self._running) + 1)
        return {
            "num_slots": min(len(self._cached_lens), num_slots),
            "view_len": min(
                self._slots.cache.keys.shape[-1], power_of_2(max(SHORTEST_VIEW, longest))
            ),
        }

    def budget(self, request: RolloutRequest) -> int:
        """Tokens that may be sampled for a request."""
        return self._max_completion_length - request.prefix_len

    def _close_ranks(self) -> None:
        """Moves those at work to the lowest slots, where that lets the decode step compute fewer of them."""
        num_slots = _rounded_slots(len(self._running))
        beyond = sorted(slot for slot in self._running if slot >= num_slots)
        if not beyond:
            return
        pairs = [(slot, heapq.heappop(self._free)) for slot in beyond]
        for old, new in pairs:
            self._running[new] = self._running.pop(old)
            self._cached_lens[new] = self._cached_lens[old]
            heapq.heappush(self._free, old)
        num_all = len(self._cached_lens)
        fill = [(0, num_all)] * (num_all - len(pairs))
        from_slots, to_slots = np.array([*pairs, *fill], np.int32).T
        self._slots = self._move(self._slots, from_slots, to_slots, np.int32(len(pairs)))

    def _leave(self, finished: Sequence[int], num_new: np.ndarray) -> list[Completion]:
        """Completions of slots, which are free again."""
        tokens, logprobs = self._fetch(finished)
        completions = []
        for i, slot in enumerate(finished):
            request = self._running.pop(slot)
            heapq.heappush(self._free, slot)
            length = num_new[slot]
            stopped = int(tokens[i, length - 1]) in self._eos_ids
            completions.append(
                Completion(
                    request=request,
                    token_ids=tuple(tokens[i, :length].tolist()),
                    logprobs=tuple(logprobs[i, :length].tolist()),
                    finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
                )
            )
        return completions

    def _fetch(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and logprobs of slots, so many at a time that one program does."""
        parts = []
        for start in range(0, len(slots), FETCHED_SLOTS):
            wanted = slots[start : start + FETCHED_SLOTS]
            rows = np.zeros(FETCHED_SLOTS, np.int32)
            rows[: len(wanted)] = wanted
            part = jax.device_get(self._rows(self._slots, rows))
            parts.append([x[: len(wanted)] for x in part])
        tokens, logprobs = (np.concatenate(x) for x in zip(*parts, strict=True))
        return tokens, logprobs

    def _admit_wave(self) -> None:
        """Admits waiting requests, as many as there are free slots and rows for their contexts."""
        self._table.unpin()
        pieces: dict[int, Piece] = {}
        starting: list[_Starting] = []
        rows: list[int] = []
        while self._waiting and self._free:
            request, step, params = self._waiting[0]
            context = request.problem.prompt_ids + request.prefix_ids
            # The last token of a context is the first that is decoded.
            found = self._table.find(request.problem.id, context[:-1])
            if found is None:
                break
            self._waiting.popleft()
            if found.copy is not None:  # of what is computed by now
                self._run_pieces(pieces)
                self._contexts = self._copy_context(self._contexts, *found.copy)
            if found.piece is not None:
                before = pieces.get(found.row)
                pieces[found.row] = _joined(before, found.piece) if before else found.piece
            slot = heapq.heappop(self._free)
            self._running[slot] = request
            rows.append(found.row)
            starting.append(
                _Starting(
                    slot=slot,
                    cached_len=len(context) - 1,
                    last_token=context[-1],
                    max_new=self.budget(request),
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    step=step,
                    problem_key=request.problem.key,
                    sample_index=request.sample_index,
                )
            )
        self._run_pieces(pieces)
        self._start_slots(rows, starting)

    def _run_pieces(self, pieces: dict[int, Piece]) -> None:
        """Computes what contexts lack, and empties `pieces`."""
        for batch in batches(pieces.values(), self._prefill_tokens):
            self._contexts = self._prefill(self._params, self._contexts, batch)
            self.counters += EngineCounters(prefilled_tokens=int(batch.lens.sum()))
        pieces.clear()

    def _start_slots(self, rows: Sequence[int], starting: Sequence[_Starting]) -> None:
        """Copies contexts to slots and sets these going. Shapes are fixed but for the length copied."""
        for start in starting:
            self._cached_lens[start.slot] = start.cached_len
        num_slots = self._slots.active.shape[0]
        num_idle = num_slots - len(starting)
        # Its slot is out of range: dropped.
        nobody = _Starting(num_slots, 0, 0, 1, 1.0, 1.0, 0, 0, 0, 0)
        columns = zip(*starting, *[nobody] * num_idle, strict=True)
        arrays = (np.asarray(c, dtype) for c, dtype in zip(columns, _STARTING_DTYPES, strict=True))
        capacity = self._contexts.keys.shape[-1]
        longest = max(SHORTEST_COPY, *(s.cached_len for s in starting))
        self._slots = self._start(
            self._slots,
            self._contexts,
            np.array([*rows, *[0] * num_idle], np.int32),
            np.int32(len(starting)),
            self._seed,
            _Starting(*arrays),
            copied_len=min(capacity, power_of_2(longest)),
        )


def _rounded_slots(number: int) -> int:
    """Slots that the decode step computes for so many at work: there is a program for each outcome."""
    return power_of_2(max(FEWEST_SLOTS, number))


def _joined(piece: Piece, continuation: Piece) -> Piece:
    """Two pieces of a row, one behind the other, as one."""
    return piece._replace(token_ids=piece.token_ids + continuation.token_ids)


def _empty_slots(config: DecoderConfig, num_slots: int, *, cache_len: int, max_new: int) -> _Slots:
    zeros = functools.partial(jnp.zeros, num_slots)
    return _Slots(
        cache=empty_cache(config, num_slots, cache_len),
        cached_lens=zeros(jnp.int32),
        last_token=zeros(jnp.int32),
        keys=jax.random.split(jax.random.key(0), num_slots),
        temperature=zeros(jnp.float32),
        top_p=zeros(jnp.float32),
        top_k=zeros(jnp.int32),
        max_new=zeros(jnp.int32),
        num_new=zeros(jnp.int32),
        active=zeros(bool),
        tokens=jnp.zeros((num_slots, max_new), jnp.int32),
        logprobs=jnp.zeros((num_slots, max_new), jnp.float32),
    )


def _copy_context(contexts: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    one = lambda row: jnp.asarray(row)[None]
    length = contexts.keys.shape[-1]
    return copy_rows(None, contexts, one(source), one(target), jnp.int32(1), length=length)


def _move(slots: _Slots, from_slots: jax.Array, to_slots: jax.Array, count: jax.Array) -> _Slots:
    """The first `count` of `from_slots` go on in `to_slots`; of the others `to_slots` is out of range."""
    length = slots.cache.keys.shape[-1]
    cache = copy_rows(None, slots.cache, from_slots, to_slots, count, length=length)
    put = lambda x: x.at[to_slots].set(x[from_slots], mode="drop")
    moved = jax.tree.map(put, slots._replace(cache=None))
    left = jnp.where(jnp.arange(len(to_slots)) < count, from_slots, len(to_slots))
    return moved._replace(cache=cache, active=moved.active.at[left].set(False, mode="drop"))


def _rows(slots: _Slots, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return slots.tokens[rows], slots.logprobs[rows]


def _start(
    slots: _Slots, contexts: KVCache, rows, count, seed, starting: _Starting, *, copied_len: int
) -> _Slots:
    """Copies the contexts of the first `count` columns to their slots and sets these going."""
    cache = copy_rows(contexts, slots.cache, rows, starting.slot, count, length=copied_len)
    keys = jax.vmap(request_key, in_axes=(None, 0, 0, 0))(
        seed, starting.step, starting.problem_key, starting.sample_index
    )
    put = lambda old, new: old.at[starting.slot].set(new, mode="drop")
    return slots._replace(
        cache=cache,
        cached_lens=put(slots.cached_lens, starting.cached_len),
        last_token=put(slots.last_token, starting.last_token),
        keys=put(slots.keys, keys),
        temperature=put(slots.temperature, starting.temperature),
        top_p=put(slots.top_p, starting.top_p),
        top_k=put(slots.top_k, starting.top_k),
        max_new=put(slots.max_new, starting.max_new),
        num_new=put(slots.num_new, 0),
        active=put(slots.active, True),
    )


def _decode(
    config: DecoderConfig,
    segment_len: int,
    eos_ids: tuple[int, ...],
    with_truncation: bool,
    params: Any,
    slots: _Slots,
    *,
    num_slots: int,
    view_len: int,
) -> tuple[_Slots, jax.Array, jax.Array]:
    """Up to `segment_len` tokens for every active slot; stops early once a share of the slots is done.

    Only the first `num_slots` may be active, and hold at most `view_len - segment_len` positions: the rest of
    the cache is not looked at.

    Returns the slots, the steps done and the tokens sampled, both int32 `[]`.
    """
    output_projection = unembedding(params).astype(config.dtype)
    every_slot = jnp.arange(num_slots)
    cache, whole = slots.cache, slots._replace(cache=None)
    slots = jax.tree.map(lambda x: x[:num_slots], whole)._replace(cache=cache)

    def one_token(carry):
        count, num_tokens, s = carry
        hidden, new = apply_decoder(
            config,
            params,
            s.last_token[:, None],
            s.cached_lens[:, None],
            cache=s.cache,
            cached_lens_S=s.cached_lens,
            view_len=view_len,
        )
        logits = jnp.matmul(hidden[:, 0], output_projection, preferred_element_type=jnp.float32)
        truncation = (s.top_p, s.top_k) if with_truncation else None
        token, logprob = draw_tokens(s.keys, s.cached_lens + 1, logits, s.temperature, truncation)
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
        return (
            count + 1,
            num_tokens + jnp.sum(s.active),
            s._replace(
                cache=cache,
                cached_lens=s.cached_lens + s.active,
                last_token=jnp.where(s.active, token, s.last_token),
                num_new=num_new,
                active=s.active & ~is_eos & (num_new < s.max_new),
                tokens=s.tokens.at[every_slot, where_new].set(token, mode="drop"),
                logprobs=s.logprobs.at[every_slot, where_new].set(logprob, mode="drop"),
            ),
        )

    num_active = jnp.sum(slots.active)
    enough_done = jnp.clip(num_active, 1, max(1, num_slots // SLOTS_A_LEAVE))

    def unfinished(carry):
        count, _, s = carry
        return (count < segment_len) & (num_active - jnp.sum(s.active) < enough_done)

    zero = jnp.int32(0)
    num_steps, num_tokens, slots = jax.lax.while_loop(unfinished, one_token, (zero, zero, slots))
    put_back = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=0)
    whole = jax.tree.map(put_back, whole, slots._replace(cache=None))
    return whole._replace(cache=slots.cache), num_steps, num_tokens
