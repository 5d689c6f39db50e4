"""Defines the interface of the storage layouts.

Shape suffixes follow `trapo_jax.models.decoder`; R is the number of rows in a cache.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trapo_jax.models.attention import Implementation

# For each matrix of a layer, the number of leading axes that its matmul contracts.
CONTRACTED_AXES = {"qkv": 1, "output": 3, "gate_up": 1, "down": 1}


class KVCache(NamedTuple):
    """Keys and values of all layers, or their shardings. The layout defines the shapes."""

    keys: Any
    values: Any


class StorageLayout(abc.ABC):
    """The storage format of the layer weights and the KV cache, and the operations that depend on it.

    Attributes:
      converts_weights: whether `convert_weights` changes the weights.
      reads_filled_only: whether `attend` reads only the filled positions of a cache, so that a shorter view saves
        nothing.
      needs_resize: whether the cache must be resized to the rows and positions in use, because `attend` reads all of
        it.
      head_axis: axis of the key-value heads in the arrays of a cache.
    """

    converts_weights: ClassVar[bool] = False
    reads_filled_only: ClassVar[bool] = False
    needs_resize: ClassVar[bool] = False
    head_axis: ClassVar[int] = 2

    @abc.abstractmethod
    def init_layers(
        self, init_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
    ) -> Any:
        """Initializes all layers with `init_layer`."""

    @abc.abstractmethod
    def run_layers(
        self,
        run_layer: Callable[..., tuple[jax.Array, Any]],
        x_BTD: jax.Array,
        layers: Any,
        cache: KVCache | None,
        is_local_L: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Runs the layers in order.

        Args:
          run_layer: `(x, layer, cache of the layer, is_local) -> (x, entries)`.
          x_BTD: the residual stream.
          layers: from `init_layers`.
          cache: the cache of all layers; None for whole rows.
          is_local_L: bool, whether a layer has a sliding window; None if this is the same for all layers.

        Returns:
          The residual stream and the entries of all layers.
        """

    @abc.abstractmethod
    def convert_weights(self, layers: Any) -> Any:
        """Converts `params["layers"]` from the stacked layout to this one."""

    def matmul(self, x_BTI: jax.Array, weights: jax.Array, *, num_contracted: int) -> jax.Array:
        """Multiplies activations by a matrix in this layout. The result has shape `[B, T, *out]`.

        Args:
          x_BTI: activations; I is the product of the contracted axes.
          weights: the matrix.
          num_contracted: see `CONTRACTED_AXES`.
        """
        # Contract a single axis: with several, XLA would first transpose the weights.
        out = weights.shape[num_contracted:]
        return jnp.tensordot(x_BTI, weights.reshape(x_BTI.shape[-1], *out), axes=1)

    @abc.abstractmethod
    def init(
        self,
        num_layers: int,
        num_rows: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> KVCache:
        """Returns an empty cache with `num_rows` rows of `length` positions."""

    @abc.abstractmethod
    def attend(
        self,
        q_STNH: jax.Array,
        k_STKH: jax.Array,
        v_STKH: jax.Array,
        cache: KVCache,
        lens_S: jax.Array,
        *,
        view_len: int | None,
        scale: float,
        window: int | None,
        is_local: jax.Array | None,
        implementation: Implementation,
    ) -> tuple[jax.Array, Any]:
        """Computes attention in one layer from T new tokens per slot to the slot's cached tokens and to each other.

        Args:
          q_STNH, k_STKH, v_STKH: the new tokens. Only `Stacked` supports more than one token per slot.
          cache: the cache of this layer, with at least S rows; only the first S are used.
          lens_S: int32, number of filled positions of each slot. If a slot's number is at least the length of the
            cache, the slot's result is finite but meaningless, and its token is not stored.
          view_len: upper bound on the number of filled positions; None for the whole cache.
          scale, window, is_local, implementation: see `row_attention`.

        Returns:
          The result `[S, T, N, H]`, and the entries for `append`, which stores the new tokens.
        """

    @abc.abstractmethod
    def append(
        self, cache: KVCache, entries: Any, rows: jax.Array, positions: jax.Array
    ) -> KVCache:
        """Stores the new tokens of all layers.

        Args:
          cache: the cache of all layers.
          entries: from `run_layers`.
          rows: int32, the row of each token.
          positions: int32, with the shape of `rows`; tokens with a position beyond the cache are dropped.
        """

    @abc.abstractmethod
    def copy(
        self, cache: KVCache, source_rows: jax.Array, target_rows: jax.Array, count: jax.Array
    ) -> KVCache:
        """Copies rows within the cache.

        Only the first `count` pairs are copied; the other target rows must be out of range. No row may be both a
        source and a target.
        """

    @abc.abstractmethod
    def insert(
        self,
        cache: KVCache,
        stacked: KVCache,
        source_rows: jax.Array,
        target_rows: jax.Array,
        count: jax.Array,
        *,
        length: int,
    ) -> KVCache:
        """Copies the first `length` positions of rows of a `Stacked` cache to this cache.

        Only the first `count` pairs are copied; the other target rows must be out of range.
        """

    def resize(self, cache: KVCache, *, num_rows: int, length: int) -> KVCache:
        """Truncates or pads the cache to `num_rows` rows of `length` positions if `needs_resize`."""
        del num_rows, length
        return cache


def keep_operand_order(product: jax.Array) -> jax.Array:
    """Prevents XLA from swapping the operands of a matmul, which can make it read the weights transposed."""
    return jax.lax.optimization_barrier(product)
