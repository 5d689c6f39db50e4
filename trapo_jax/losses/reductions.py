"""Reductions of per-token losses to a scalar, each with a named normalizer.

Every reduction is `sum(values * weights)`, with weights that depend only on `where`, the mask of the tokens to include.
A train step computes the weights once for the whole optimizer batch. Therefore, the gradient does not depend on how the
batch is split into micro-batches, packed into rows, or sharded over devices.

    token_mean      w = 1 / number of included tokens
    sequence_mean   w = 1 / (number of included tokens in the sequence * number of sequences with included tokens)
    constant_sum    w = 1 / length
    constant_mean   w = 1 / (length * number of sequences)
"""

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, check_positive, float32_where


def token_mean_weights(where: ArrayLike) -> Array:
    """Returns the weights of `token_mean`, float32 with the shape of `where`; all 0 if no token is included."""
    mask = jnp.asarray(where, jnp.float32)
    return mask / jnp.maximum(1.0, jnp.sum(mask))


def sequence_mean_weights(where: ArrayLike, *, axis: int = -1) -> Array:
    """Returns the weights of `sequence_mean`, float32 with the shape of `where`; each sequence lies along `axis`."""
    mask = jnp.asarray(where, jnp.float32)
    num_tokens = jnp.sum(mask, axis=axis, keepdims=True)
    return mask / jnp.maximum(1.0, num_tokens) / jnp.maximum(1.0, jnp.sum(num_tokens > 0))


def segment_mean_weights(where: ArrayLike, segment_ids: ArrayLike, *, num_segments: int) -> Array:
    """Returns the weights of `sequence_mean` for packed rows, where each segment is a sequence.

    Args:
      where: boolean `[...]`, the tokens to include.
      segment_ids: integers `[...]` in `[0, num_segments)`; tokens with equal ids form a sequence, even across rows.
      num_segments: exclusive upper bound on the ids; must be static.

    Returns:
      float32 with the shape of `where`. Segments without included tokens do not count as sequences.

    Example:
      >>> segment_mean_weights(jnp.array([True, True, True]), jnp.array([1, 1, 2]), num_segments=3)
      Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    mask = jnp.asarray(where, jnp.float32)
    num_tokens = jax.ops.segment_sum(mask.ravel(), jnp.ravel(segment_ids), num_segments)
    per_segment = 1.0 / jnp.maximum(1.0, num_tokens) / jnp.maximum(1.0, jnp.sum(num_tokens > 0))
    return mask * per_segment[jnp.asarray(segment_ids)]


def constant_sum_weights(where: ArrayLike, *, length: ArrayLike) -> Array:
    """Returns the weights of `constant_sum`, float32 with the shape of `where`; `length` is > 0, in tokens."""
    check_positive("length", length)
    return jnp.asarray(where, jnp.float32) / length


def constant_mean_weights(
    where: ArrayLike, *, length: ArrayLike, num_sequences: ArrayLike
) -> Array:
    """Returns the weights of `constant_mean`, float32 with the shape of `where`; `num_sequences` >= 1."""
    return constant_sum_weights(where, length=length) / num_sequences


def token_mean(values: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Computes the mean of `values` over all included tokens of the batch.

    Args:
      values: `[...]`, per-token losses.
      where: boolean, broadcastable to `values`: the tokens to include; all if None.

    Returns:
      float32 `[]`; 0 if no token is included.

    Example:
      >>> token_mean(jnp.array([[1.0, 2.0], [6.0, 9.0]]), where=jnp.array([[1, 1], [1, 0]]) > 0)
      Array(3., dtype=float32)
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * token_mean_weights(mask))


def sequence_mean(values: ArrayLike, *, where: ArrayLike | None = None, axis: int = -1) -> Array:
    """Computes the mean over each sequence's included tokens, averaged over sequences.

    Args:
      values: `[..., T, ...]`, per-token losses, one sequence along `axis`.
      where: boolean, broadcastable to `values`: the tokens to include; all if None.
      axis: the token axis.

    Returns:
      float32 `[]`. Sequences without included tokens do not count; 0 if no token is included.

    Example:
      >>> sequence_mean(jnp.array([[1.0, 2.0], [6.0, 9.0]]), where=jnp.array([[1, 1], [1, 0]]) > 0)
      Array(3.75, dtype=float32)
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * sequence_mean_weights(mask, axis=axis))


def constant_sum(values: ArrayLike, *, length: ArrayLike, where: ArrayLike | None = None) -> Array:
    """Computes the sum of the included `values` divided by a constant `length`, usually the maximum length.

    Args:
      values: `[...]`, per-token losses.
      length: > 0, in tokens; must not depend on the batch.
      where: boolean, broadcastable to `values`: the tokens to include; all if None.

    Returns:
      float32 `[]`: the sum over all rows, divided by `length`.

    Raises:
      ValueError: if `length` <= 0.
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * constant_sum_weights(mask, length=length))


def constant_mean(
    values: ArrayLike, *, length: ArrayLike, where: ArrayLike | None = None, axis: int = -1
) -> Array:
    """Computes `constant_sum` averaged over the rows: sum / (length * rows).

    Args:
      values: `[..., T, ...]`, per-token losses, one sequence along `axis`.
      length: > 0, in tokens.
      where: boolean, broadcastable to `values`: the tokens to include; all if None.
      axis: the token axis; the other axes are rows. All rows count, even rows without included tokens.

    Returns:
      float32 `[]`; 0 if there are no rows.

    Raises:
      ValueError: if `length` <= 0.
    """
    values, mask = _values_and_mask(values, where)
    num_rows = max(1, values.size // max(1, values.shape[axis]))
    weights = constant_mean_weights(mask, length=length, num_sequences=num_rows)
    return jnp.sum(values * weights)


def _values_and_mask(values: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array]:
    values = float32_where(values, where)
    mask = jnp.broadcast_to(True if where is None else jnp.asarray(where), values.shape)
    return values, mask
