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
    is_for_cudnn,
    lay_apart,
    output_projection,
)
from trapo_jax.sampling.contexts import copy_contexts, copy_rows, empty_cache, prefill
from trapo_jax.sampling.draw import draw_tokens, request_key
from trapo_jax.types import TENSOR_AXIS

# A segment ends early once one slot in so many is done: others may wait for its place.
SLOTS_A_LEAVE = 16
NOWHERE = 2**30  # a position beyond every cache: what is written there is dropped
# Bytes of a layer's weights from which on a CPU decodes layers that lie apart, turned. Measured: twice as fast with
# 14 MB a layer, a fifth slower with 0.4 MB.
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
    resize_cache: Any  # (slots, *, num_slots, view_len) -> slots; None but for turned layers
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
    decoding = decoder_of_slots(config, mesh)
    is_turned = decoding.layers == "turned"
    lay_out = jax.jit(functools.partial(lay_apart, turned=is_turned))
    return Programs(
        lay_out=None if decoding.layers == "stacked" else lay_out,
        prefill=jax.jit(
            functools.partial(prefill, config), donate_argnums=1, out_shardings=by_heads
        ),
        copy_context=jax.jit(copy_context, donate_argnums=0, out_shardings=by_heads),
        start_slots=jax.jit(
            functools.partial(start_slots, decoding),
            static_argnames="copied_len",
            donate_argnums=0,
            out_shardings=for_slots,
        ),
        move_slots=jax.jit(move_slots, donate_argnums=0, out_shardings=for_slots),
        resize_cache=jax.jit(resize_cache, static_argnames=("num_slots", "view_len"))
        if is_turned
        else None,
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


def decoder_of_slots(config: DecoderConfig, mesh: Mesh) -> DecoderConfig:
    """The decoder, its layers lying as these devices decode fastest: apart where cuDNN attends to what a slot holds."""
    weights = sum(x.size for x in jax.tree.leaves(abstract_params(config)["layers"]))
    layer_bytes = weights // config.num_layers * jnp.dtype(config.dtype).itemsize
    platform = mesh.devices.flat[0].platform
    layers = "stacked"
    takes_cudnn = is_for_cudnn(platform, config.dtype, config.head_dim)
    if takes_cudnn and config.attention in ("auto", "cudnn") and not any(config.local_layers):
        layers = "apart"
    elif platform == "cpu" and mesh.size == 1 and layer_bytes >= LARGE_LAYER:
        layers = "turned"
    return dataclasses.replace(config, layers=layers)


def empty_state(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    num_contexts: int,
    num_slots: int,
    cache_len: int,
    max_new: int,
) -> tuple[KVCache, Slots]:
    """Contexts and slots that hold nothing, for these devices."""
    decoding = decoder_of_slots(config, mesh)
    return (
        empty_cache(config, num_contexts, cache_len),
        empty_slots(decoding, num_slots, cache_len=cache_len, max_new=max_new),
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
    return copy_rows(contexts, one(source), one(target), jnp.int32(1))


def move_slots(slots: Slots, from_slots: jax.Array, to_slots: jax.Array, count: jax.Array) -> Slots:
    """The first `count` of `from_slots` go on in `to_slots`; of the others `to_slots` is out of range."""
    cache = copy_rows(slots.cache, from_slots, to_slots, count)
    put = lambda x: x.at[to_slots].set(x[from_slots], mode="drop")
    moved = jax.tree.map(put, slots._replace(cache=None))
    left = jnp.where(jnp.arange(len(to_slots)) < count, from_slots, len(to_slots))
    return moved._replace(cache=cache, active=moved.active.at[left].set(False, mode="drop"))


def resize_cache(slots: Slots, *, num_slots: int, view_len: int) -> Slots:
    """The slots with a cache of turned layers for the first `num_slots`, of `view_len` positions each."""

    def fit(x: jax.Array, *shape: int) -> jax.Array:
        kept = x[tuple(map(slice, shape))]
        return jnp.pad(kept, [(0, new - old) for new, old in zip(shape, kept.shape, strict=True)])

    keys = [fit(x, num_slots, *x.shape[1:3], view_len) for x in slots.cache.keys]
    values = [fit(x, num_slots, x.shape[1], view_len, x.shape[3]) for x in slots.cache.values]
    return slots._replace(cache=KVCache(keys, values))


def read_rows(slots: Slots, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return slots.tokens[rows], slots.logprobs[rows]


def start_slots(
    config: DecoderConfig,
    slots: Slots,
    contexts: KVCache,
    rows: jax.Array,
    count: jax.Array,
    seed: jax.Array,
    starting: Starting,
    *,
    copied_len: int,
) -> Slots:
    """Copies the contexts of the first `count` columns to their slots and sets these going."""
    cache = copy_contexts(
        config, contexts, slots.cache, rows, starting.slot, count, length=copied_len
    )
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

    Only the first `num_slots` may be active, and hold at most `view_len - segment_len` positions. Of stacked layers the
    rest of the cache is not looked at; where they are apart, of every slot only what it holds is; turned ones have a
    cache of that size.

    Returns the slots, the steps done and the tokens sampled, both int32 `[]`.
    """
    to_logits = output_projection(config, params)
    every_slot = jnp.arange(num_slots)
    whole = slots
    slots = jax.tree.map(lambda x: x[:num_slots], whole._replace(cache=None))
    slots = slots._replace(cache=whole.cache)

    def one_token(carry):
        count, num_tokens, s = carry
        hidden, new = apply_decoder(
            config,
            params,
            s.last_token[:, None],
            s.cached_lens[:, None],
            cache=s.cache,
            cached_lens_S=jnp.where(s.active, s.cached_lens, NOWHERE),
            view_len=view_len,
        )
        logits = to_logits(hidden[:, 0])
        truncation = (s.top_p, s.top_k) if with_truncation else None
        token, logprob = draw_tokens(s.keys, s.cached_lens + 1, logits, s.temperature, truncation)
        where_new = jnp.where(s.active, s.num_new, s.tokens.shape[1])
        if config.layers == "stacked":
            # No token is negative: that is asked so that XLA sees all reading of the cache before the writing, and does
            # it in place.
            where_cached = jnp.where(s.active & (token >= 0), s.cached_lens, NOWHERE)
            new_keys, new_values = (entry[:, :, 0].swapaxes(0, 1) for entry in new)  # [S, L, K, H]
            cache = KVCache(
                s.cache.keys.at[:, every_slot, :, :, where_cached].set(new_keys, mode="drop"),
                s.cache.values.at[:, every_slot, :, where_cached].set(new_values, mode="drop"),
            )
        else:
            cache = new
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
    put_back = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
    return jax.tree.map(put_back, whole, slots), num_steps, num_tokens
