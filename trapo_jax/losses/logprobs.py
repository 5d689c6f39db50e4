"""Per-token log-probabilities and entropies, computed from logits or directly from hidden states."""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import (
    Array,
    ArrayLike,
    check_positive,
    float32_where,
    zero_where_masked,
)


def token_logprobs(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Computes the log-probability of each label under softmax(logits).

    `logprob = logits[label] - logsumexp(logits)`

    Args:
      logits: `[..., V, ...]` with the vocabulary at `axis`; any float dtype; converted to float32.
      labels: integers in `[0, V)`, with the shape of `logits` without `axis`. An out-of-range label
        gives NaN unless it is masked (it never wraps around, as an index of -100 would in NumPy).
      axis: the vocabulary axis of `logits`.
      where: boolean, broadcastable to `labels`; False gives exactly 0 and no gradient,
        regardless of the logits and labels.

    Returns:
      float32 with the shape of `labels`, in `[-inf, 0]`, at temperature 1.

    Example:
      >>> token_logprobs(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4)
      Array([-1.3863, -1.3863], dtype=float32)
    """
    log_probs = jax.nn.log_softmax(_fill_masked_logits(logits, axis, where), axis=axis)
    labels = jnp.asarray(labels)
    in_range = (labels >= 0) & (labels < log_probs.shape[axis])
    safe_labels = jnp.where(in_range, labels, 0)
    picked = jnp.take_along_axis(log_probs, jnp.expand_dims(safe_labels, axis), axis=axis)
    return zero_where_masked(jnp.where(in_range, picked.squeeze(axis), jnp.nan), where)


def entropy(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    """Computes the entropy of softmax(logits), in nats.

    `H = -sum_v p_v log p_v`, with `0 log 0 = 0` (logits may be -inf).

    Args:
      logits: `[..., V, ...]` with the vocabulary at `axis`; any float dtype; converted to float32.
      axis: the vocabulary axis of `logits`.
      where: boolean, broadcastable to `logits` without `axis`; False gives exactly 0.

    Returns:
      float32 with the shape of `logits` without `axis`, in `[0, log V]`.

    Example:
      >>> entropy(jnp.zeros((1, 4))).round(4)
      Array([1.3863], dtype=float32)
    """
    log_probs = jax.nn.log_softmax(_fill_masked_logits(logits, axis, where), axis=axis)
    probs = jnp.exp(log_probs)
    finite_log_probs = jnp.where(probs > 0, log_probs, 0.0)
    return zero_where_masked(-jnp.sum(probs * finite_log_probs, axis=axis), where)


def _fill_masked_logits(logits: ArrayLike, axis: int, where: ArrayLike | None) -> Array:
    if where is None:
        return float32_where(logits, None)
    # Broadcast first, since `axis` refers to the axes of `logits`, and `where` may have fewer axes.
    label_shape = list(jnp.shape(logits))
    del label_shape[axis]
    return float32_where(logits, jnp.expand_dims(jnp.broadcast_to(where, label_shape), axis))


@overload
def linear_token_logprobs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    labels: ArrayLike,
    *,
    chunk_size: int,
    temperature: float = 1.0,
    with_entropy: Literal[False] = False,
    where: ArrayLike | None = None,
) -> Array: ...
@overload
def linear_token_logprobs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    labels: ArrayLike,
    *,
    chunk_size: int,
    temperature: float = 1.0,
    with_entropy: Literal[True],
    where: ArrayLike | None = None,
) -> tuple[Array, Array]: ...
def linear_token_logprobs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    labels: ArrayLike,
    *,
    chunk_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    where: ArrayLike | None = None,
) -> Array | tuple[Array, Array]:
    """Computes `token_logprobs(hidden @ unembedding / temperature, labels)` without materializing `[T, V]` logits.

    The forward and backward passes iterate over slices of the vocabulary. A slice's logits for all T tokens take about
    as much memory as the logits of `chunk_size` tokens for the whole vocabulary. The forward pass keeps a running
    logsumexp. The backward pass recomputes the logits, unless they all fit in one slice, in which case the forward pass
    keeps them. It computes each slice of the unembedding's gradient in a single float32 accumulation.

    Args:
      hidden: `[..., D]`, float32 or bfloat16. The leading axes are flattened into T tokens.
      unembedding: `[D, V]`, float32 or bfloat16; products accumulate in float32.
      labels: integers `[...]` in `[0, V)`; out-of-range labels give NaN, as in `token_logprobs`.
      chunk_size: >= 1; about `chunk_size * V` float32 logits are in memory at once. Larger values use more memory and
        have less loop overhead. If `chunk_size` is at least T, there is only one slice.
      temperature: > 0; the distribution is `softmax(logits / temperature)`.
      with_entropy: whether to also return the entropy of that distribution; it is differentiable, too.
      where: boolean `[...]`; False gives exactly 0 and no gradient.

    Returns:
      The log-probabilities, float32 `[...]`, or `(logprobs, entropy)`, each float32 `[...]`.

    Raises:
      ValueError: if `chunk_size` < 1 or `temperature` <= 0.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    check_positive("temperature", temperature)
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    labels = jnp.asarray(labels)
    if where is not None:
        hidden = jnp.where(jnp.expand_dims(jnp.asarray(where), -1), hidden, 0)
    flat_labels = labels.reshape(-1)
    in_range = (flat_labels >= 0) & (flat_labels < unembedding.shape[1])
    outputs: Any = _chunked_logprobs(
        max(1, min(chunk_size, flat_labels.size)),
        hidden.reshape(-1, hidden.shape[-1]),
        unembedding,
        jnp.where(in_range, flat_labels, 0),
        jnp.asarray(1.0 / temperature, jnp.float32),
    )
    logprobs, entropies = outputs
    logprobs = jnp.where(in_range, logprobs, jnp.nan).reshape(labels.shape)
    logprobs = zero_where_masked(logprobs, where)
    if not with_entropy:
        return logprobs
    return logprobs, zero_where_masked(entropies.reshape(labels.shape), where)


def _matmul(a: Array, b: Array) -> Array:
    # On GPUs and TPUs, JAX rounds the float32 operands of matmuls by default.
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, preferred_element_type=jnp.float32, precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_logprobs(
    chunk_size: int, hidden: Array, unembedding: Array, labels: Array, scale: Array
) -> tuple[Array, Array]:
    return _chunked_forward(chunk_size, hidden, unembedding, labels, scale)[0]


def _chunked_forward(chunk_size, hidden, unembedding, labels, scale):
    slice_len, starts = _slices(chunk_size, labels.shape[0], unembedding.shape[1])

    def one_slice(carry, start):
        largest, total, weighted, picked = carry
        columns, weights, is_new = _vocabulary_slice(unembedding, start, slice_len)
        raw = _matmul(hidden, weights)
        logits = jnp.where(is_new, raw * scale, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        shrink = jnp.exp(largest - new_largest)
        exps = jnp.exp(logits - new_largest[:, None])
        total = total * shrink + jnp.sum(exps, axis=-1)
        products = jnp.where(exps > 0, exps * logits, 0.0)
        weighted = weighted * shrink + jnp.sum(products, axis=-1)
        is_label = is_new & (labels[:, None] == columns)
        picked += jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        # If there is only one slice, the logits are kept for the backward pass.
        return (new_largest, total, weighted, picked), raw if len(starts) == 1 else None

    zeros = jnp.zeros(labels.shape, jnp.float32)
    # A finite initial maximum, so that -inf is not subtracted from -inf in a slice whose logits are all -inf.
    lowest = jnp.full_like(zeros, jnp.finfo(jnp.float32).min)
    (largest, total, weighted, picked), kept = jax.lax.scan(
        one_slice, (lowest, zeros, zeros, zeros), starts
    )
    lse = largest + jnp.log(total)
    entropies = lse - weighted / total
    return (picked - lse, entropies), (hidden, unembedding, labels, scale, lse, entropies, kept)


def _chunked_backward(chunk_size, residuals, cotangents):
    """Computes all gradients from the gradient with respect to the unscaled logits.

    `grad_raw = scale * [grad_logprob * (onehot - p) - grad_entropy * p * (log p + H)]`
    """
    hidden, unembedding, labels, scale, lse, entropies, kept = residuals
    grad_logprob, grad_entropy = cotangents
    slice_len, starts = _slices(chunk_size, labels.shape[0], unembedding.shape[1])

    def one_slice(carry, slice_):
        grad_hidden, grad_unembedding, grad_scale = carry
        start, raw = slice_
        columns, weights, is_new = _vocabulary_slice(unembedding, start, slice_len)
        raw = _matmul(hidden, weights) if raw is None else raw
        log_p = raw * scale - lse[:, None]
        p = jnp.exp(log_p)
        finite_log_p = jnp.where(p > 0, log_p, 0.0)
        onehot = labels[:, None] == columns
        grad_logits = grad_logprob[:, None] * (onehot - p) - grad_entropy[:, None] * p * (
            finite_log_p + entropies[:, None]
        )
        grad_scale += jnp.sum(jnp.where(is_new, grad_logits * raw, 0.0))
        grad_raw = (grad_logits * scale).astype(weights.dtype)
        grad_hidden += _matmul(grad_raw, jnp.where(is_new, weights, 0).T)
        # Columns that are not new are overwritten with the same values; masking them would require a copy.
        grad_unembedding = jax.lax.dynamic_update_slice_in_dim(
            grad_unembedding,
            _matmul(hidden.T, grad_raw).astype(unembedding.dtype),
            columns[0],
            axis=1,
        )
        return (grad_hidden, grad_unembedding, grad_scale), None

    initial = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros_like(unembedding),
        jnp.zeros((), jnp.float32),
    )
    (grad_hidden, grad_unembedding, grad_scale), _ = jax.lax.scan(
        one_slice, initial, (starts, kept)
    )
    return grad_hidden.astype(hidden.dtype), grad_unembedding, None, grad_scale


def _slices(chunk_size: int, num_tokens: int, vocab_size: int) -> tuple[int, Array]:
    """Returns the number of columns per slice, and the first column of each slice."""
    slice_len = -(-chunk_size * vocab_size // max(1, num_tokens))
    slice_len = min(slice_len, vocab_size)
    return slice_len, jnp.arange(0, vocab_size, slice_len)


def _vocabulary_slice(
    unembedding: Array, start: Array, slice_len: int
) -> tuple[Array, Array, Array]:
    """Returns a slice's column indices, its weights, and a mask of the columns that no earlier slice contains.

    The last slice is shifted to end at V, so it may overlap the previous slice.
    """
    begin = jnp.minimum(start, unembedding.shape[1] - slice_len)
    columns = begin + jnp.arange(slice_len)
    # On CPUs, XLA would convert the whole bfloat16 operand of the slice operation to float32 and keep the result in
    # memory (2.2 GB for a 7B model). XLA does not convert integers, so slice a bitcast of the operand. The bitcast is
    # free inside the loop; the barrier prevents XLA from hoisting it out of the loop as a copy.
    unembedding, begin = jax.lax.optimization_barrier((unembedding, begin))
    bits = jax.lax.bitcast_convert_type(unembedding, f"uint{8 * unembedding.dtype.itemsize}")
    bits = jax.lax.dynamic_slice_in_dim(bits, begin, slice_len, axis=1)
    return columns, jax.lax.bitcast_convert_type(bits, unembedding.dtype), columns >= start


_chunked_logprobs.defvjp(_chunked_forward, _chunked_backward)
