"""What the engine does on the device: slots are set going, decoded a segment at a time, moved and read."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trapo_jax.models import (
    DecoderConfig,
    KVCache,
    abstract_params,
    apply_decoder,
    by_layer,
    output_projection,
)
from trapo_jax.sampling.contexts import copy_rows, empty_cache, prefill
from trapo_jax.sampling.draw import draw_tokens, request_key
from trapo_jax.types import TENSOR_AXIS

# A segment ends early once one slot in so many is done: others may wait for its place.
SLOTS_A_LEAVE = 16
# Bytes of a layer's weights from which on a CPU decodes layers that lie apart. Measured: twice as fast with 14 MB a
# layer, a fifth slower with 0.4 MB.
LARGE_LAYER = 2**20


class Starting(NamedTuple):
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


STARTING_DTYPES = (np.int32,) * 4 + (np.float32,) * 2 + (np.int32,) + (np.uint32,) * 3


class Slots(NamedTuple):
    """Device state, one entry a slot, or in its place its shardings. `new` counts tokens."""

    cache: KVCache
    cached_lens: Any  # int32 [S]
    last_token: Any  # int32 [S], to be fed next; its position is cached_lens
    keys: Any  # random keys [S]
    temperature: Any  # float32 [S]
    top_p: Any  # float32 [S]
    top_k: Any  # int32 [S]
    max_new: Any  # int32 [S]
    num_new: Any  # int32 [S]
    active: Any  # bool [S]
    tokens: Any  # int32 [S, R] sampled so far
    logprobs: Any  # float32 [S, R]


class Programs(NamedTuple):
    """What a replica runs, compiled for its devices; each gives back the state that it was given."""

    lay_out: Any  # params["layers"] -> as decode_segment takes them; None where it takes these
    prefill: Any  # (params, contexts, batch) -> contexts
    copy_context: Any  # (contexts, source, target) -> contexts
    start_slots: Any  # (slots, contexts, rows, count, seed, starting, *, copied_len) -> slots
    move_slots: Any  # (slots, from_slots, to_slots, count) -> slots
    decode_segment: Any  # (params, slots, *, num_slots, view_len) -> slots, steps, tokens
    read_rows: Any  # (slots, rows) -> tokens, logprobs


def make_programs(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    segment_len: int,
    eos_ids: Sequence[int],
    with_truncation: bool,
) -> Programs:
    """The programs of a replica on `mesh`, which has the axis `tp` alone; their shapes come with their arguments."""
    by_heads, for_slots = state_shardings(mesh)
    everywhere = NamedSharding(mesh, P())
    decoding = dataclasses.replace(config, by_layer=_decodes_by_layer(config, mesh))
    return Programs(
        lay_out=jax.jit(by_layer) if decoding.by_layer else None,
        prefill=jax.jit(
            functools.partial(prefill, config), donate_argnums=1, out_shardings=by_heads
        ),
        copy_context=jax.jit(copy_context, donate_argnums=0, out_shardings=by_heads),
        start_slots=jax.jit(
            start_slots, static_argnames="copied_len", donate_argnums=0, out_shardings=for_slots
        ),
        move_slots=jax.jit(move_slots, donate_argnums=0, out_shardings=for_slots),
        decode_segment=jax.jit(
            functools.partial(
                decode_segment, decoding, segment_len, tuple(eos_ids), with_truncation
            ),
            static_argnames=("num_slots", "view_len"),
            donate_argnums=1,
            out_shardings=(for_slots, everywhere, everywhere),
        ),
        read_rows=jax.jit(read_rows),
    )


def state_shardings(mesh: Mesh) -> tuple[KVCache, Slots]:
    """Of contexts and slots: keys and values split by heads, the rest everywhere."""
    by_heads = KVCache(*(NamedSharding(mesh, P(None, None, TENSOR_AXIS)),) * 2)
    everywhere = NamedSharding(mesh, P())
    return by_heads, Slots(by_heads, *(everywhere,) * (len(Slots._fields) - 1))


def empty_state(
    config: DecoderConfig, *, num_contexts: int, num_slots: int, cache_len: int, max_new: int
) -> tuple[KVCache, Slots]:
    """Contexts and slots that hold nothing."""
    return (
        empty_cache(config, num_contexts, cache_len),
        empty_slots(config, num_slots, cache_len=cache_len, max_new=max_new),
    )


def empty_slots(config: DecoderConfig, num_slots: int, *, cache_len: int, max_new: int) -> Slots:
    zeros = functools.partial(jnp.zeros, num_slots)
    return Slots(
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


def copy_context(contexts: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    one = lambda row: jnp.asarray(row)[None]
    length = contexts.keys.shape[-1]
    return copy_rows(None, contexts, one(source), one(target), jnp.int32(1), length=length)


def move_slots(slots: Slots, from_slots: jax.Array, to_slots: jax.Array, count: jax.Array) -> Slots:
    """The first `count` of `from_slots` go on in `to_slots`; of the others `to_slots` is out of range."""
    length = slots.cache.keys.shape[-1]
    cache = copy_rows(None, slots.cache, from_slots, to_slots, count, length=length)
    put = lambda x: x.at[to_slots].set(x[from_slots], mode="drop")
    moved = jax.tree.map(put, slots._replace(cache=None))
    left = jnp.where(jnp.arange(len(to_slots)) < count, from_slots, len(to_slots))
    return moved._replace(cache=cache, active=moved.active.at[left].set(False, mode="drop"))


def read_rows(slots: Slots, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return slots.tokens[rows], slots.logprobs[rows]


def start_slots(
    slots: Slots, contexts: KVCache, rows, count, seed, starting: Starting, *, copied_len: int
) -> Slots:
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
    """Up to `segment_len` tokens for every active slot; stops early once a share of the slots is done.

    Only the first `num_slots` may be active, and hold at most `view_len - segment_len` positions: the rest of
    the cache is not looked at.

    Returns the slots, the steps done and the tokens sampled, both int32 `[]`.
    """
    to_logits = output_projection(config, params)
    every_slot = jnp.arange(num_slots)
    cache, whole = slots.cache, slots._replace(cache=None)
    slots = jax.tree.map(lambda x: x[:num_slots], whole)._replace(cache=cache)
    view = _layers_of(cache, num_slots, view_len) if config.by_layer else None

    def one_token(carry):
        count, num_tokens, s, view = carry
        hidden, new = apply_decoder(
            config,
            params,
            s.last_token[:, None],
            s.cached_lens[:, None],
            cache=s.cache if view is None else view,
            cached_lens_S=s.cached_lens,
            view_len=view_len,
        )
        logits = to_logits(hidden[:, 0])
        truncation = (s.top_p, s.top_k) if with_truncation else None
        token, logprob = draw_tokens(s.keys, s.cached_lens + 1, logits, s.temperature, truncation)
        # Inactive slots write out of range, which drops it. No token is negative: that is asked so that XLA sees all
        # reading of the cache before the writing, and does it in place.
        beyond = s.cache.keys.shape[-1]
        where_cached = jnp.where(s.active & (token >= 0), s.cached_lens, beyond)
        where_new = jnp.where(s.active, s.num_new, s.tokens.shape[1])
        if view is not None:
            view = _with_entries(view, new, where_cached)
            new = [jnp.stack(layers) for layers in new]
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
            view,
        )

    num_active = jnp.sum(slots.active)
    enough_done = jnp.clip(num_active, 1, max(1, num_slots // SLOTS_A_LEAVE))

    def unfinished(carry):
        count, _, s, _ = carry
        return (count < segment_len) & (num_active - jnp.sum(s.active) < enough_done)

    zero = jnp.int32(0)
    carry = (zero, zero, slots, view)
    num_steps, num_tokens, slots, _ = jax.lax.while_loop(unfinished, one_token, carry)
    put_back = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=0)
    whole = jax.tree.map(put_back, whole, slots._replace(cache=None))
    return whole._replace(cache=slots.cache), num_steps, num_tokens


def _decodes_by_layer(config: DecoderConfig, mesh: Mesh) -> bool:
    layers = jax.tree.leaves(abstract_params(config)["layers"])
    weights = sum(x.size for x in layers) // config.num_layers
    is_large = weights * jnp.dtype(config.dtype).itemsize >= LARGE_LAYER
    return is_large and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _layers_of(cache: KVCache, num_slots: int, view_len: int) -> KVCache:
    """What a segment looks at, every layer's apart: a CPU would copy that slice at every step."""
    layers = range(len(cache.keys))
    return KVCache(
        keys=[cache.keys[i, :num_slots, :, :, :view_len] for i in layers],
        values=[cache.values[i, :num_slots, :, :view_len] for i in layers],
    )


def _with_entries(layers: KVCache, new: Any, where_S: jax.Array) -> KVCache:
    """The layers, with a token's keys and values of every slot (`[S, 1, K, H]` a layer) at its position."""
    slots = jnp.arange(len(where_S))
    put_key = lambda old, key: old.at[slots, :, :, where_S].set(key[:, 0], mode="drop")
    put_value = lambda old, value: old.at[slots, :, where_S].set(value[:, 0], mode="drop")
    return KVCache([*map(put_key, layers.keys, new[0])], [*map(put_value, layers.values, new[1])])
