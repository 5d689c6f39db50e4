"""The layout that stacks all layers in one array."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trapo_jax.models.attention import cached_attention
from trapo_jax.models.kv_layouts.interface import KVCache, StorageLayout


@dataclasses.dataclass(frozen=True)
class Stacked(StorageLayout):
    """All layers in one array, run by a scan: keys `[L, R, K, H, C]`, values `[L, R, K, C, H]`.

    A layer only reads the cache. `append` writes the new tokens of all layers at once, in place.
    """

    def init_layers(self, init_layer, num_layers, rngs):
        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap
        def stacked_layers(rngs):
            return init_layer(rngs)

        return stacked_layers(rngs)

    def run_layers(self, run_layer, x_BTD, layers, cache, is_local_L):
        scan = nnx.scan(run_layer, in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0))
        return scan(x_BTD, layers, cache, is_local_L)

    def convert_weights(self, layers):
        return layers

    def init(self, num_layers, num_rows, length, num_kv_heads, head_dim, dtype):
        zeros = lambda *shape: jnp.zeros((num_layers, num_rows, num_kv_heads, *shape), dtype)
        return KVCache(zeros(head_dim, length), zeros(length, head_dim))

    def attend(self, q_STNH, k_STKH, v_STKH, cache, lens_S, *, view_len, implementation, **options):
        del implementation
        # Slicing one layer at a time avoids a second copy of the cache.
        keys, values = (x[: len(q_STNH)] for x in cache)
        keys, values = keys[..., :view_len], values[..., :view_len, :]
        entries = k_STKH, v_STKH
        return cached_attention(q_STNH, entries, keys, values, lens_S, **options), entries

    def append(self, cache, entries, rows, positions):
        if positions.ndim == 1:
            entries = [entry[:, :, 0] for entry in entries]
        # The indexed axes come first: [*positions.shape, L, K, H].
        keys, values = (jnp.moveaxis(entry, 0, positions.ndim) for entry in entries)
        return KVCache(
            cache.keys.at[:, rows, :, :, positions].set(keys, mode="drop"),
            cache.values.at[:, rows, :, positions].set(values, mode="drop"),
        )

    def copy(self, cache, source_rows, target_rows, count):
        def copy_row(i, cache: KVCache) -> KVCache:
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, source_rows[i], 1, axis=1)
            put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, take(x), target_rows[i], axis=1)
            return jax.tree.map(put, cache)

        return jax.lax.fori_loop(0, count, copy_row, cache)

    def insert(self, cache, stacked, source_rows, target_rows, count, *, length):
        def copy_row(i, cache: KVCache) -> KVCache:
            keys, values = read_row(stacked, source_rows[i], length)
            put = lambda old, new: jax.lax.dynamic_update_slice(
                old, new[:, None], (0, target_rows[i], 0, 0, 0)
            )
            return KVCache(put(cache.keys, keys), put(cache.values, values))

        return jax.lax.fori_loop(0, count, copy_row, cache)


def read_row(stacked: KVCache, row: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first `length` positions of a row, for all layers."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False)
    return take(stacked.keys)[..., :length], take(stacked.values)[..., :length, :]
