"""From per-token values to a number, with the normaliser by name.

Every reduction is `sum(values * weights)`, and its weights depend on the mask alone. A train step computes
the weights once for the whole optimiser batch; the same weights then serve however the batch is cut into
micro-batches, packed into rows or spread over devices, which is why the gradient does not depend on it.

    token_mean      w = 1 / number of masked tokens
    sequence_mean   w = 1 / (masked tokens of the sequence * number of sequences that have any)
    constant_sum    w = 1 / length
    constant_mean   w = 1 / (length * number of sequences)
"""

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, check_positive, float32_where


def token_mean_weights(where: ArrayLike) -> Array:
    """Weights of `token_mean`: float32, the shape of the boolean `where`; all 0 for an empty mask."""
    mask = jnp.asarray(where, jnp.float32)
    return mask / jnp.maximum(1.0, jnp.sum(mask))


def sequence_mean_weights(where: ArrayLike, *, axis: int = -1) -> Array:
    """Weights of `sequence_mean`: float32, the shape of `where`, one sequence along `axis`."""
    mask = jnp.asarray(where, jnp.float32)
    num_tokens = jnp.sum(mask, axis=axis, keepdims=True)
    return mask / jnp.maximum(1.0, num_tokens) / jnp.maximum(1.0, jnp.sum(num_tokens > 0))


def segment_mean_weights(where: ArrayLike, segment_ids: ArrayLike, *, num_segments: int) -> Array:
    """Weights of `sequence_mean` for packed rows, whose sequences are segments.

    Args:
      where: boolean `[...]`.
      segment_ids: integers `[...]` in `[0, num_segments)`; equal ones, in whatever row, are one sequence.
      num_segments: an upper bound of the ids, static.

    Returns:
      float32, the shape of `where`; segments without a masked token do not count.

    Example:
      >>> segment_mean_weights(jnp.array([True, True, True]), jnp.array([1, 1, 2]), num_segments=3)
      Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    mask = jnp.asarray(where, jnp.float32)
    num_tokens = jax.ops.segment_sum(mask.ravel(), jnp.ravel(segment_ids), num_segments)
    per_segment = 1.0 / jnp.maximum(1.0, num_tokens) / jnp.maximum(1.0, jnp.sum(num_tokens > 0))
    return mask * per_segment[jnp.asarray(segment_ids)]


def constant_sum_weights(where: ArrayLike, *, length: ArrayLike) -> Array:
    """Weights of `constant_sum`: float32, the shape of `where`; `length` > 0 in tokens."""
    check_positive("length", length)
    return jnp.asarray(where, jnp.float32) / length


def constant_mean_weights(
    where: ArrayLike, *, length: ArrayLike, num_sequences: ArrayLike
) -> Array:
    """Weights of `constant_mean`: float32, the shape of `where`; `num_sequences` >= 1."""
    return constant_sum_weights(where, length=length) / num_sequences


def token_mean(values: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Mean of `values` over all masked tokens of the batch.

    Args:
      values: `[...]` per-token losses.
      where: boolean, broadcastable to `values`; all True if None.

    Returns:
      float32 `[]`; 0 for an empty mask.

    Example:
      >>> token_mean(jnp.array([[1.0, 2.0], [6.0, 9.0]]), where=jnp.array([[1, 1], [1, 0]]) > 0)
      Array(3., dtype=float32)
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * token_mean_weights(mask))


def sequence_mean(values: ArrayLike, *, where: ArrayLike | None = None, axis: int = -1) -> Array:
    """Mean over sequences of the mean over each sequence's masked tokens.

    Args:
      values: `[..., T, ...]` per-token losses, one sequence along `axis`.
      where: boolean, broadcastable to `values`; all True if None.
      axis: position of the tokens of a sequence.

    Returns:
      float32 `[]`; sequences without a masked token do not count; 0 if there is none.

    Example:
      >>> sequence_mean(jnp.array([[1.0, 2.0], [6.0, 9.0]]), where=jnp.array([[1, 1], [1, 0]]) > 0)
      Array(3.75, dtype=float32)
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * sequence_mean_weights(mask, axis=axis))


def constant_sum(values: ArrayLike, *, length: ArrayLike, where: ArrayLike | None = None) -> Array:
    """Sum of the masked `values` divided by a constant `length` (usually the maximum length).

    Args:
      values: `[...]` per-token losses.
      length: > 0, in tokens; does not depend on the batch.
      where: boolean, broadcastable to `values`; all True if None.

    Returns:
      float32 `[]`: per row sum / length, summed over rows.

    Raises:
      ValueError: if `length` <= 0.
    """
    values, mask = _values_and_mask(values, where)
    return jnp.sum(values * constant_sum_weights(mask, length=length))


def constant_mean(
    values: ArrayLike, *, length: ArrayLike, where: ArrayLike | None = None, axis: int = -1
) -> Array:
    """`constant_sum` averaged over the rows: sum / (length * rows).

    Args:
      values: `[..., T, ...]` per-token losses, one sequence along `axis`.
      length: > 0, in tokens.
      where: boolean, broadcastable to `values`; all True if None.
      axis: position of the tokens of a sequence; the other axes are rows, all of which count,
        with or without a masked token.

    Returns:
      float32 `[]`; 0 if there is no row.

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
