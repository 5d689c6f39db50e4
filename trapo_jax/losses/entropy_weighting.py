"""Losses that depend on the policy's entropy: SRFT's weights and Prefix-RFT's token selection."""

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, float32_where, zero_where_masked


def entropy_weighted_cross_entropy(
    logprobs: ArrayLike,
    entropies: ArrayLike,
    *,
    sign: float,
    where: ArrayLike | None = None,
) -> Array:
    """Computes cross-entropy weighted by entropy: `-exp(sign * H) * logprob`.

    Args:
      logprobs: `[...]`, log-probabilities of the tokens, in `[-inf, 0]`.
      entropies: the entropies H >= 0, broadcastable to `logprobs`; no gradient flows through them.
      sign: -1 reduces the weight of tokens where the policy is uncertain (SRFT's expert tokens); 1 increases it
        (SRFT's completion tokens).
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced.

    References:
      SRFT, as ported in the Unify-Post-Training repository (`compute_token_on_off_policy_srft_loss`).

    Example:
      >>> entropy_weighted_cross_entropy(jnp.array([-1.0]), jnp.log(jnp.array([2.0])), sign=-1.0)
      Array([0.5], dtype=float32)
    """
    logprobs = float32_where(logprobs, where)
    entropies = jax.lax.stop_gradient(float32_where(entropies, where))
    return zero_where_masked(-jnp.exp(sign * entropies) * logprobs, where)


def segment_mean(
    values: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments: int,
    where: ArrayLike | None = None,
) -> Array:
    """Computes, for each element, the mean of the included values in its segment.

    Args:
      values: `[...]`.
      segment_ids: integers `[...]` in `[0, num_segments)`; elements with equal ids form a segment.
      num_segments: exclusive upper bound on the ids; must be static.
      where: boolean, broadcastable to `values`: the elements to include; all if None.

    Returns:
      float32 `[...]`, also defined at excluded elements; 0 for segments without included elements.

    Example:
      >>> segment_mean(jnp.array([1.0, 3.0, 5.0]), jnp.array([1, 1, 2]), num_segments=3)
      Array([2., 2., 5.], dtype=float32)
    """
    values = float32_where(values, where)
    mask = jnp.broadcast_to(True if where is None else jnp.asarray(where), values.shape)
    ids = jnp.asarray(segment_ids)
    total = lambda x: jax.ops.segment_sum(x.ravel(), ids.ravel(), num_segments)
    means = total(values) / jnp.maximum(1.0, total(mask.astype(jnp.float32)))
    return means[ids]


def top_of_segment(
    values: ArrayLike,
    segment_ids: ArrayLike,
    *,
    share: float,
    where: ArrayLike | None = None,
) -> Array:
    """Selects the `ceil(share * n)` largest of the n included elements in each segment; earlier elements win ties.

    Args:
      values: `[..., T]`.
      segment_ids: integers `[..., T]`; a segment must not span multiple rows.
      share: the fraction of elements to select, in (0, 1].
      where: boolean, broadcastable to `values`: the elements to include; all if None.

    Returns:
      bool `[..., T]`, False where masked.

    Example:
      >>> top_of_segment(jnp.array([3.0, 1.0, 2.0]), jnp.array([1, 1, 1]), share=0.5)
      Array([ True, False,  True], dtype=bool)
    """
    values = float32_where(values, where)
    mask = jnp.broadcast_to(True if where is None else jnp.asarray(where), values.shape)
    # Sort by segment. Within a segment, included elements come first, in descending order.
    ids = jnp.broadcast_to(jnp.asarray(segment_ids), values.shape)
    order = jnp.lexsort((-values, ~mask, ids))
    sorted_ids, counts = (jnp.take_along_axis(x, order, -1) for x in (ids, mask))
    place = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
    is_first = jnp.diff(sorted_ids, prepend=sorted_ids[..., :1] - 1, axis=-1) != 0
    start = jax.lax.cummax(jnp.where(is_first, place, 0), axis=values.ndim - 1)
    before = jnp.cumsum(counts, axis=-1) - counts  # number of included elements before
    is_last = jnp.roll(is_first, -1, axis=-1).at[..., -1].set(True)
    end = jax.lax.cummin(
        jnp.where(is_last, place, values.shape[-1]), axis=values.ndim - 1, reverse=True
    )
    num = jnp.take_along_axis(before + counts, end, -1) - jnp.take_along_axis(before, start, -1)
    top = counts & (place - start < jnp.ceil(share * num))
    return jnp.take_along_axis(top, jnp.argsort(order, axis=-1), -1)
