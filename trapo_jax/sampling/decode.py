"""Implements the device computations: prefilling contexts, and starting, decoding, moving, and reading slots."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trapo_jax.models import (
    DecoderConfig,
    KVCache,
    apply_decoder,
    init_cache,
    output_projection,
)
from trapo_jax.sampling.draw import draw_tokens, request_key
from trapo_jax.sampling.prefix_cache import PrefillBatch
from trapo_jax.sampling.slots import SlotStart

# A segment ends early once 1 / REFILL_DIVISOR of its slots have finished, so that queued requests can use them.
REFILL_DIVISOR = 16
OUT_OF_RANGE = 2**30  # a position beyond the end of every cache, where writes are dropped


class Slots(NamedTuple):
    """The state of all slots on the devices, or its shardings. "New" tokens were sampled since the slot started."""

    cache: KVCache
    cached_lens: Any  # int32 [S]
    last_token: Any  # int32 [S], the next token to feed, at position `cached_lens`
    keys: Any  # random keys [S]
    temperature: Any  # float32 [S]
    top_p: Any  # float32 [S]
    top_k: Any  # int32 [S]
    max_new: Any  # int32 [S]
    num_new: Any  # int32 [S]
    active: Any  # bool [S]
    tokens: Any  # int32 [S, max_new], the new tokens
    logprobs: Any  # float32 [S, max_new]


def init_slots(config: DecoderConfig, num_slots: int, *, cache_len: int, max_new: int) -> Slots:
    """Returns inactive slots."""
    zeros = functools.partial(jnp.zeros, num_slots)
    return Slots(
        cache=init_cache(config, num_slots, cache_len),
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


def prefill(config: DecoderConfig, params: Any, contexts: KVCache, batch: PrefillBatch) -> KVCache:
    """Runs chunks through the model and appends their keys and values to the chunks' rows.

    Args:
      config: the decoder, with the `Stacked` layout.
      params: the decoder's parameters.
      contexts: the prefix cache.
      batch: the chunks.
    """
    index = jnp.arange(batch.token_ids.shape[1])
    positions = batch.starts[:, None] + index
    cached = KVCache(contexts.keys[:, batch.rows], contexts.values[:, batch.rows])
    _, entries = apply_decoder(
        config, params, batch.token_ids, positions, cache=cached, cached_lens_S=batch.starts
    )
    cache_len = contexts.keys.shape[-1]
    positions = jnp.where(index < batch.lens[:, None], positions, cache_len)  # padding is dropped
    rows = jnp.broadcast_to(batch.rows[:, None], positions.shape)
    return config.layout.append(contexts, entries, rows, positions)


def copy_context(
    config: DecoderConfig, contexts: KVCache, source: jax.Array, target: jax.Array
) -> KVCache:
    """Copies one row of the prefix cache to another."""
    as_array = lambda row: jnp.asarray(row)[None]
    return config.layout.copy(contexts, as_array(source), as_array(target), jnp.int32(1))


def start_slots(
    config: DecoderConfig,
    slots: Slots,
    contexts: KVCache,
    rows: jax.Array,
    count: jax.Array,
    seed: jax.Array,
    starts: SlotStart,
    *,
    copied_len: int,
) -> Slots:
    """Copies contexts to slots and activates the slots.

    Args:
      config: the decoder, in the layout of the slots.
      slots: the state of the slots.
      contexts: the prefix cache.
      rows: int32 `[S]`, the prefix cache row of each start's context.
      count: int32 `[]`, number of starts. The remaining entries of `starts` have an out-of-range slot and are dropped.
      seed: uint32 `[]`, the run's seed.
      starts: initial states, arrays of shape `[S]`.
      copied_len: number of positions to copy, at least the longest `cached_len`.
    """
    cache = config.layout.insert(slots.cache, contexts, rows, starts.slot, count, length=copied_len)
    keys = jax.vmap(request_key, in_axes=(None, 0, 0, 0))(
        seed, starts.step, starts.problem_key, starts.sample_index
    )
    put = lambda old, new: old.at[starts.slot].set(new, mode="drop")
    return slots._replace(
        cache=cache,
        cached_lens=put(slots.cached_lens, starts.cached_len),
        last_token=put(slots.last_token, starts.last_token),
        keys=put(slots.keys, keys),
        temperature=put(slots.temperature, starts.temperature),
        top_p=put(slots.top_p, starts.top_p),
        top_k=put(slots.top_k, starts.top_k),
        max_new=put(slots.max_new, starts.max_new),
        num_new=put(slots.num_new, 0),
        active=put(slots.active, True),
    )


def move_slots(
    config: DecoderConfig,
    slots: Slots,
    from_slots: jax.Array,
    to_slots: jax.Array,
    count: jax.Array,
) -> Slots:
    """Moves the first `count` slots of `from_slots` to `to_slots`. The remaining `to_slots` must be out of range."""
    cache = config.layout.copy(slots.cache, from_slots, to_slots, count)
    put = lambda x: x.at[to_slots].set(x[from_slots], mode="drop")
    moved = jax.tree.map(put, slots._replace(cache=None))
    vacated = jnp.where(jnp.arange(len(to_slots)) < count, from_slots, len(to_slots))
    return moved._replace(cache=cache, active=moved.active.at[vacated].set(False, mode="drop"))


def resize_cache(config: DecoderConfig, slots: Slots, *, num_slots: int, view_len: int) -> Slots:
    """Resizes the cache to the first `num_slots` slots, with `view_len` positions each."""
    cache = config.layout.resize(slots.cache, num_rows=num_slots, length=view_len)
    return slots._replace(cache=cache)


def read_slots(slots: Slots, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens and log-probabilities of the given slots."""
    return slots.tokens[rows], slots.logprobs[rows]


def decode_segment(
    config: DecoderConfig,
    segment_len: int,
    eos_ids: tuple[int, ...],
    with_truncation: bool,
    params: Any,
    slots: Slots,
    *,
    num_slots: int,
    view_len: int,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Samples up to `segment_len` tokens in every active slot, and stops early once enough slots have finished.

    Args:
      config: the decoder, in the layout of the slots.
      segment_len, eos_ids, with_truncation: see `EngineSpec`.
      params: the parameters in the same layout.
      slots: the state of the slots. Only the first `num_slots` may be active, with at most `view_len - segment_len`
        filled positions.
      num_slots: number of slots to compute.
      view_len: number of positions to read.

    Returns:
      The slots, and the numbers of decode steps and of sampled tokens, both int32 `[]`.
    """
    to_logits = output_projection(config, params)
    whole = slots
    slots = jax.tree.map(lambda x: x[:num_slots], whole._replace(cache=None))
    slots = slots._replace(cache=whole.cache)

    def decode_step(carry):
        count, num_tokens, s = carry
        num_active = jnp.sum(s.active)
        s = _decode_token(
            config,
            params,
            to_logits,
            s,
            view_len=view_len,
            eos_ids=eos_ids,
            truncate=with_truncation,
        )
        return count + 1, num_tokens + num_active, s

    num_active = jnp.sum(slots.active)
    enough_finished = jnp.clip(num_active, 1, max(1, num_slots // REFILL_DIVISOR))

    def should_continue(carry):
        count, _, s = carry
        return (count < segment_len) & (num_active - jnp.sum(s.active) < enough_finished)

    zero = jnp.int32(0)
    num_steps, num_tokens, slots = jax.lax.while_loop(
        should_continue, decode_step, (zero, zero, slots)
    )
    put_back = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
    return jax.tree.map(put_back, whole, slots), num_steps, num_tokens


def _decode_token(
    config: DecoderConfig,
    params: Any,
    to_logits: Callable[[jax.Array], jax.Array],
    s: Slots,
    *,
    view_len: int,
    eos_ids: tuple[int, ...],
    truncate: bool,
) -> Slots:
    """Samples one token in every active slot."""
    hidden, entries = apply_decoder(
        config,
        params,
        s.last_token[:, None],
        s.cached_lens[:, None],
        cache=s.cache,
        cached_lens_S=jnp.where(s.active, s.cached_lens, OUT_OF_RANGE),
        view_len=view_len,
    )
    logits = to_logits(hidden[:, 0])
    truncation = (s.top_p, s.top_k) if truncate else None
    token, logprob = draw_tokens(s.keys, s.cached_lens + 1, logits, s.temperature, truncation)
    slot = jnp.arange(len(s.active))
    # `token >= 0` is always true. The comparison makes the write depend on the sampled token, so that XLA schedules all
    # reads of the cache before the write and updates the cache in place.
    cache_position = jnp.where(s.active & (token >= 0), s.cached_lens, OUT_OF_RANGE)
    output_position = jnp.where(s.active, s.num_new, s.tokens.shape[1])
    num_new = s.num_new + s.active
    is_eos = jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
    return s._replace(
        cache=config.layout.append(s.cache, entries, slot, cache_position),
        cached_lens=s.cached_lens + s.active,
        last_token=jnp.where(s.active, token, s.last_token),
        num_new=num_new,
        active=s.active & ~is_eos & (num_new < s.max_new),
        tokens=s.tokens.at[slot, output_position].set(token, mode="drop"),
        logprobs=s.logprobs.at[slot, output_position].set(logprob, mode="drop"),
    )
