"""Builds a replica's compiled programs and the state that they operate on, and chooses the storage layout."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trapo_jax.models import (
    DecoderConfig,
    KVCache,
    PerLayer,
    PerLayerTransposed,
    Stacked,
    StorageLayout,
    abstract_params,
    init_cache,
    is_for_cudnn,
)
from trapo_jax.sampling.decode import (
    Slots,
    copy_context,
    decode_segment,
    init_slots,
    move_slots,
    prefill,
    read_slots,
    resize_cache,
    start_slots,
)
from trapo_jax.types import TENSOR_AXIS

# Minimum size of one layer's weights, in bytes, for decoding with `PerLayerTransposed` on a CPU. In measurements, this
# layout was twice as fast as `Stacked` with 14 MB per layer, and 20% slower with 0.4 MB.
MIN_TRANSPOSED_LAYER_BYTES = 2**20


class Programs(NamedTuple):
    """The programs of a replica. Programs that update contexts or slots return new ones and donate the old ones."""

    convert_weights: (
        Any  # params["layers"] -> the same weights in the layout; None if the layout is `Stacked`
    )
    prefill: Any  # (params, contexts, batch) -> contexts
    copy_context: Any  # (contexts, source, target) -> contexts
    start_slots: Any  # (slots, contexts, rows, count, seed, starts, *, copied_len) -> slots
    move_slots: Any  # (slots, from_slots, to_slots, count) -> slots
    resize_cache: (
        Any  # (slots, *, num_slots, view_len) -> slots; None if the layout needs no resize
    )
    decode_segment: Any  # (params, slots, *, num_slots, view_len) -> slots, num_steps, num_tokens
    read_slots: Any  # (slots, rows) -> tokens, logprobs


@functools.lru_cache(maxsize=4)
def make_programs(
    config: DecoderConfig,
    mesh: Mesh,
    layout: StorageLayout,
    *,
    segment_len: int,
    eos_ids: tuple[int, ...],
    with_truncation: bool,
) -> Programs:
    """Returns the programs of a replica. A program is compiled when it is first called with arguments of new shapes.

    Engines in the same process share the programs, so a second engine for the same model compiles nothing.

    Args:
      config: the decoder, with the `Stacked` layout, which is used for prefilling.
      mesh: the devices of the replica, with `tp` as the only axis.
      layout: the storage layout for decoding.
      segment_len, eos_ids, with_truncation: see `EngineSpec`.
    """
    for_contexts, for_slots = state_shardings(mesh, layout)
    replicated = NamedSharding(mesh, P())
    decoding = dataclasses.replace(config, layout=layout)
    return Programs(
        convert_weights=jax.jit(layout.convert_weights) if layout.converts_weights else None,
        prefill=jax.jit(
            functools.partial(prefill, config), donate_argnums=1, out_shardings=for_contexts
        ),
        copy_context=jax.jit(
            functools.partial(copy_context, config), donate_argnums=0, out_shardings=for_contexts
        ),
        start_slots=jax.jit(
            functools.partial(start_slots, decoding),
            static_argnames="copied_len",
            donate_argnums=0,
            out_shardings=for_slots,
        ),
        move_slots=jax.jit(
            functools.partial(move_slots, decoding), donate_argnums=0, out_shardings=for_slots
        ),
        resize_cache=jax.jit(
            functools.partial(resize_cache, decoding), static_argnames=("num_slots", "view_len")
        )
        if layout.needs_resize
        else None,
        decode_segment=jax.jit(
            functools.partial(decode_segment, decoding, segment_len, eos_ids, with_truncation),
            static_argnames=("num_slots", "view_len"),
            donate_argnums=1,
            out_shardings=(for_slots, replicated, replicated),
        ),
        read_slots=jax.jit(read_slots),
    )


def choose_layout(config: DecoderConfig, mesh: Mesh) -> StorageLayout:
    """Returns the layout that makes decoding fastest on these devices.

    cuDNN reads only the filled part of a `PerLayer` cache. CPUs multiply by large matrices faster if the matrices are
    transposed.
    """
    weights = sum(x.size for x in jax.tree.leaves(abstract_params(config)["layers"]))
    layer_bytes = weights // config.num_layers * jnp.dtype(config.dtype).itemsize
    platform = mesh.devices.flat[0].platform
    takes_cudnn = is_for_cudnn(platform, config.dtype, config.head_dim)
    if takes_cudnn and config.attention in ("auto", "cudnn") and not config.has_windows:
        return PerLayer()
    if platform == "cpu" and mesh.size == 1 and layer_bytes >= MIN_TRANSPOSED_LAYER_BYTES:
        return PerLayerTransposed()
    return Stacked()


def init_state(
    config: DecoderConfig,
    layout: StorageLayout,
    *,
    num_contexts: int,
    num_slots: int,
    cache_len: int,
    max_new: int,
) -> tuple[KVCache, Slots]:
    """Returns an empty prefix cache and empty slots.

    Args:
      config: see `make_programs`.
      layout: storage layout of the slots.
      num_contexts: number of rows in the prefix cache.
      num_slots: number of slots.
      cache_len: number of positions in each row and slot.
      max_new: maximum number of tokens sampled in a slot.
    """
    decoding = dataclasses.replace(config, layout=layout)
    return (
        init_cache(config, num_contexts, cache_len),
        init_slots(decoding, num_slots, cache_len=cache_len, max_new=max_new),
    )


def state_shardings(mesh: Mesh, layout: StorageLayout) -> tuple[KVCache, Slots]:
    """Returns the shardings of contexts and slots: keys and values are sharded over heads, and the rest is replicated.

    Args:
      mesh: see `make_programs`.
      layout: storage layout of the slots.
    """

    def by_heads(layout: StorageLayout) -> KVCache:
        sharding = NamedSharding(mesh, P(*[None] * layout.head_axis, TENSOR_AXIS))
        return KVCache(sharding, sharding)

    replicated = NamedSharding(mesh, P())
    slots = Slots(by_heads(layout), *(replicated,) * (len(Slots._fields) - 1))
    return by_heads(Stacked()), slots
