"""Layouts with one array per layer, for decoding one token per slot."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from trapo_jax.models.attention import cached_attention, decode_attention
from trapo_jax.models.kv_layouts.interface import (
    CONTRACTED_AXES,
    KVCache,
    StorageLayout,
    keep_operand_order,
)
from trapo_jax.models.kv_layouts.stacked import read_row

# Number of rows copied at once. With one row at a time, launching the copies would take longer than copying.
ROWS_PER_COPY = 8


@dataclasses.dataclass(frozen=True)
class PerLayer(StorageLayout):
    """One array per layer, for decoding one token per slot: keys and values are lists of `[R, C, K, H]` arrays.

    This is cuDNN's axis order, and cuDNN reads only the filled positions. On CPUs and GPUs, XLA copies a layer's
    weights out of a stacked array before each matmul; separate arrays avoid that. Each layer writes its new token to
    the cache before it attends. Sliding windows are not supported.
    """

    converts_weights: ClassVar[bool] = True
    reads_filled_only: ClassVar[bool] = True

    def init_layers(self, init_layer, num_layers, rngs):
        return nnx.List(init_layer(rngs) for _ in range(num_layers))

    def run_layers(self, run_layer, x_BTD, layers, cache, is_local_L):
        all_entries = []
        for i, layer in enumerate(layers):
            layer_cache = None if cache is None else KVCache(cache.keys[i], cache.values[i])
            is_local = None if is_local_L is None else is_local_L[i]
            x_BTD, entries = run_layer(x_BTD, layer, layer_cache, is_local)
            all_entries.append(entries)
        return x_BTD, KVCache(*map(list, zip(*all_entries, strict=True)))

    def convert_weights(self, layers):
        def convert_layer(i: int) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: self._convert(path[-1].key, x[i]), layers
            )

        return {i: convert_layer(i) for i in range(len(layers["attention_norm"]))}

    def init(self, num_layers, num_rows, length, num_kv_heads, head_dim, dtype):
        return _zeros(num_layers, (num_rows, length, num_kv_heads, head_dim), dtype)

    def attend(
        self,
        q_STNH,
        k_STKH,
        v_STKH,
        cache,
        lens_S,
        *,
        view_len,
        scale,
        window,
        is_local,
        implementation,
    ):
        del view_len, is_local
        if window is not None:
            raise ValueError("the PerLayer layout does not support sliding windows")
        slots = jnp.arange(len(lens_S))
        put = lambda old, new: old.at[slots, lens_S].set(new[:, 0], mode="drop")
        cache = KVCache(put(cache.keys, k_STKH), put(cache.values, v_STKH))
        is_stored = lens_S < cache.values.shape[1]
        attended = decode_attention(
            q_STNH[:, 0],
            cache.keys,
            cache.values,
            jnp.where(is_stored, lens_S, 0) + 1,
            scale=scale,
            implementation=implementation,
        )
        return attended, cache

    def append(self, cache, entries, rows, positions):
        del cache, rows, positions
        return entries  # `attend` has already stored the new tokens

    def copy(self, cache, source_rows, target_rows, count):
        def copy_rows(rows, cache: KVCache) -> KVCache:
            sources, targets = rows
            return jax.tree.map(lambda x: x.at[targets].set(x[sources], mode="drop"), cache)

        return _in_chunks(copy_rows, (source_rows, target_rows), count, cache)

    def insert(self, cache, stacked, source_rows, target_rows, count, *, length):
        def copy_rows(rows, cache: KVCache) -> KVCache:
            sources, targets = rows
            put = lambda old, new: old.at[targets, :length].set(new, mode="drop")
            keys = (x[sources, :, :, :length].transpose(0, 3, 1, 2) for x in stacked.keys)
            values = (x[sources, :, :length].transpose(0, 2, 1, 3) for x in stacked.values)
            return KVCache([*map(put, cache.keys, keys)], [*map(put, cache.values, values)])

        return _in_chunks(copy_rows, (source_rows, target_rows), count, cache)

    def _convert(self, name: str, x: jax.Array) -> jax.Array:
        """Returns a parameter of one layer in this layout."""
        del name
        return x


@dataclasses.dataclass(frozen=True)
class PerLayerTransposed(PerLayer):
    """One array per layer: keys `[R, K, H, C]`, values `[R, K, C, H]`. Weight matrices are transposed: `[*out, in]`.

    With few rows of activations, CPUs multiply up to twice as fast if the activations are the right operand. Because a
    view of the cache would be copied in every step, the cache itself is resized to the positions in use.
    """

    reads_filled_only: ClassVar[bool] = False
    needs_resize: ClassVar[bool] = True
    head_axis: ClassVar[int] = 1

    def matmul(self, x_BTI, weights, *, num_contracted):
        del num_contracted  # the contracted axes are merged into the last axis
        y = keep_operand_order(jnp.tensordot(weights, x_BTI, axes=(-1, -1)))
        return jnp.moveaxis(y, (-2, -1), (0, 1))

    def init(self, num_layers, num_rows, length, num_kv_heads, head_dim, dtype):
        keys = _zeros(num_layers, (num_rows, num_kv_heads, head_dim, length), dtype).keys
        values = _zeros(num_layers, (num_rows, num_kv_heads, length, head_dim), dtype).values
        return KVCache(keys, values)

    def attend(self, q_STNH, k_STKH, v_STKH, cache, lens_S, *, view_len, implementation, **options):
        del view_len, implementation
        slots = jnp.arange(len(lens_S))
        cache = KVCache(
            cache.keys.at[slots, :, :, lens_S].set(k_STKH[:, 0], mode="drop"),
            cache.values.at[slots, :, lens_S].set(v_STKH[:, 0], mode="drop"),
        )
        is_stored = lens_S < cache.values.shape[-2]
        lens_S = jnp.where(is_stored, lens_S, 0)
        return cached_attention(q_STNH, None, cache.keys, cache.values, lens_S, **options), cache

    def insert(self, cache, stacked, source_rows, target_rows, count, *, length):
        def copy_row(i, cache: KVCache) -> KVCache:
            keys, values = read_row(stacked, source_rows[i], length)
            put = lambda old, new: jax.lax.dynamic_update_slice(
                old, new[None], (target_rows[i], 0, 0, 0)
            )
            return KVCache([*map(put, cache.keys, keys)], [*map(put, cache.values, values)])

        return jax.lax.fori_loop(0, count, copy_row, cache)

    def resize(self, cache, *, num_rows, length):
        def fit(x: jax.Array, *shape: int) -> jax.Array:
            kept = x[tuple(map(slice, shape))]
            padding = [(0, new - old) for new, old in zip(shape, kept.shape, strict=True)]
            return jnp.pad(kept, padding)

        keys = [fit(x, num_rows, *x.shape[1:3], length) for x in cache.keys]
        values = [fit(x, num_rows, x.shape[1], length, x.shape[3]) for x in cache.values]
        return KVCache(keys, values)

    def _convert(self, name, x):
        if name not in CONTRACTED_AXES:
            return x
        return jnp.moveaxis(x.reshape(-1, *x.shape[CONTRACTED_AXES[name] :]), 0, -1)


def _zeros(num_layers: int, shape: tuple[int, ...], dtype: str) -> KVCache:
    zeros = lambda: [jnp.zeros(shape, dtype) for _ in range(num_layers)]
    return KVCache(zeros(), zeros())


def _in_chunks(
    copy_rows: Callable[[Any, KVCache], KVCache],
    rows: tuple[jax.Array, jax.Array],
    count: jax.Array,
    cache: KVCache,
) -> KVCache:
    """Calls `copy_rows` with `ROWS_PER_COPY` pairs of rows at a time."""
    size = min(ROWS_PER_COPY, len(rows[0]))

    def copy_chunk(i, cache: KVCache) -> KVCache:
        # The start of the last chunk is clamped, so some pairs may be copied twice, which is harmless.
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size)
        return copy_rows(jax.tree.map(take, rows), cache)

    return jax.lax.fori_loop(0, (count + size - 1) // size, copy_chunk, cache)
