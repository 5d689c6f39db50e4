"""From logits, or straight from hidden states, to per-token log-probabilities and entropy."""

from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, float32_where, zero_where_masked


def token_logprobs(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Log-probability of each label under softmax(logits).

    `logprob = logits[label] - logsumexp(logits)`

    Args:
      logits: `[..., V, ...]` with the vocabulary at `axis`; any float dtype, computed in float32.
      labels: integers, the shape of `logits` without `axis`, in `[0, V)`. A label outside
        gives NaN (never the value of some other token, as an index of -100 would in NumPy),
        unless it is masked.
      axis: position of the vocabulary in `logits`.
      where: boolean, broadcastable to `labels`; False gives exactly 0 and no gradient,
        whatever the logits and labels hold there.

    Returns:
      float32, the shape of `labels`, in `[-inf, 0]`. Not scaled by a temperature.

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
    """Entropy of softmax(logits), in nats.

    `H = -sum_v p_v log p_v`, with `0 log 0 = 0` (a logit may be -inf).

    Args:
      logits: `[..., V, ...]` with the vocabulary at `axis`; any float dtype, computed in float32.
      axis: position of the vocabulary.
      where: boolean, broadcastable to `logits` without `axis`; False gives exactly 0.

    Returns:
      float32, the shape of `logits` without `axis`, in `[0, log V]`.

    Example:
      >>> entropy(jnp.zeros((1, 4))).round(4)
      Array([1.3863], dtype=float32)
    """
    log_probs = jax.nn.log_softmax(_fill_masked_logits(logits, axis, where), axis=axis)
    probs = jnp.exp(log_probs)
    finite_log_probs = jnp.where(probs > 0, log_probs, 0.0)
    return zero_where_masked(-jnp.sum(probs * finite_log_probs, axis=axis), where)


def _fill_masked_logits(logits: ArrayLike, axis: int, where: ArrayLike | None) -> Array:
    expanded = None if where is None else jnp.expand_dims(jnp.asarray(where), axis)
    return float32_where(logits, expanded)


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
    """`token_logprobs(hidden @ unembedding / temperature, labels)` without ever holding `[T, V]`.

    The forward pass takes `chunk_size` tokens at a time. The backward pass computes the
    logits anew (from the saved logsumexp), a slice of the vocabulary at a time, so that
    each slice of the unembedding's gradient is finished in one float32 accumulation. Both
    keep about `chunk_size * V` float32 logits in flight.

    Args:
      hidden: `[..., D]`, float32 or bfloat16. All leading axes together are the T tokens.
      unembedding: `[D, V]`, float32 or bfloat16; products accumulate in float32.
      labels: integers `[...]` in `[0, V)`; a label outside gives NaN, as in `token_logprobs`.
      chunk_size: tokens per chunk, >= 1. Memory goes up with it, loop overhead down.
      temperature: > 0; the log-probabilities are those of `softmax(logits / temperature)`.
      with_entropy: also return the entropy of that distribution, differentiable.
      where: boolean `[...]`; False gives exactly 0 and no gradient.

    Returns:
      logprobs float32 `[...]`, or `(logprobs, entropy)`, each float32 `[...]`.

    Raises:
      ValueError: if `chunk_size` < 1 or `temperature` <= 0.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    hidden, unembedding, labels = map(jnp.asarray, (hidden, unembedding, labels))
    if where is not None:
        hidden = jnp.where(jnp.expand_dims(jnp.asarray(where), -1), hidden, 0)
    flat_labels = labels.reshape(-1)
    in_range = (flat_labels >= 0) & (flat_labels < unembedding.shape[1])
    logprobs, entropies = _chunked_logprobs(
        min(chunk_size, flat_labels.size),
        hidden.reshape(-1, hidden.shape[-1]),
        unembedding,
        jnp.where(in_range, flat_labels, 0),
        jnp.asarray(1.0 / temperature, jnp.float32),
    )
    logprobs = jnp.where(in_range, logprobs, jnp.nan).reshape(labels.shape)
    logprobs = zero_where_masked(logprobs, where)
    if not with_entropy:
        return logprobs
    return logprobs, zero_where_masked(entropies.reshape(labels.shape), where)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_logprobs(
    chunk_size: int, hidden: Array, unembedding: Array, labels: Array, scale: Array
) -> tuple[Array, Array]:
    return _chunked_forward(chunk_size, hidden, unembedding, labels, scale)[0]


def _chunked_forward(chunk_size, hidden, unembedding, labels, scale):
    def one_chunk(chunk):
        hidden_c, labels_c = chunk
        logits = _matmul(hidden_c, unembedding) * scale
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, labels_c[:, None], axis=-1)[:, 0]
        probs = jnp.exp(logits - lse[:, None])
        mean_logit = jnp.sum(jnp.where(probs > 0, probs * logits, 0.0), axis=-1)
        return picked - lse, lse - mean_logit, lse

    num_tokens = labels.shape[0]
    chunks = jax.tree.map(lambda x: _split(x, chunk_size), (hidden, labels))
    outputs = jax.lax.map(one_chunk, chunks)
    logprobs, entropies, lse = (x.reshape(-1)[:num_tokens] for x in outputs)
    return (logprobs, entropies), (hidden, unembedding, labels, scale, lse, entropies)


def _chunked_backward(chunk_size, residuals, cotangents):
    """d logits = scale * [g_logprob * (onehot - p) - g_entropy * p * (log p + H)]."""
    hidden, unembedding, labels, scale, lse, entropies = residuals
    grad_logprob, grad_entropy = cotangents
    vocab_size = unembedding.shape[1]
    slice_len = max(1, -(-chunk_size * vocab_size // max(1, labels.shape[0])))
    num_slices = -(-vocab_size // slice_len)

    def one_slice(carry, start):
        grad_hidden, grad_unembedding, grad_scale = carry
        # The last slice is moved back to end at V; what the one before has done counts once.
        begin = jnp.minimum(start, vocab_size - slice_len)
        columns = begin + jnp.arange(slice_len)
        weights = jax.lax.dynamic_slice_in_dim(unembedding, begin, slice_len, axis=1)
        raw = _matmul(hidden, weights)
        log_p = raw * scale - lse[:, None]
        p = jnp.exp(log_p)
        finite_log_p = jnp.where(p > 0, log_p, 0.0)
        onehot = labels[:, None] == columns
        grad_logits = grad_logprob[:, None] * (onehot - p) - grad_entropy[:, None] * p * (
            finite_log_p + entropies[:, None]
        )
        grad_logits = jnp.where(columns >= start, grad_logits, 0.0)
        grad_scale += jnp.sum(grad_logits * raw)
        grad_raw = (grad_logits * scale).astype(weights.dtype)
        grad_hidden += _matmul(grad_raw, weights.T)
        update = _matmul(hidden.T, grad_raw).astype(unembedding.dtype)
        done = jax.lax.dynamic_slice_in_dim(grad_unembedding, begin, slice_len, axis=1)
        grad_unembedding = jax.lax.dynamic_update_slice_in_dim(
            grad_unembedding, jnp.where(columns >= start, update, done), begin, axis=1
        )
        return (grad_hidden, grad_unembedding, grad_scale), None

    initial = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros_like(unembedding),
        jnp.zeros((), jnp.float32),
    )
    starts = jnp.arange(num_slices) * slice_len
    (grad_hidden, grad_unembedding, grad_scale), _ = jax.lax.scan(one_slice, initial, starts)
    return grad_hidden.astype(hidden.dtype), grad_unembedding, None, grad_scale


def _split(x: Array, chunk_size: int) -> Array:
    """[T, ...] -> [ceil(T / chunk_size), chunk_size, ...], padded with zeros."""
    num_chunks = -(-x.shape[0] // chunk_size)
    padding = [(0, num_chunks * chunk_size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(num_chunks, chunk_size, *x.shape[1:])


_chunked_logprobs.defvjp(_chunked_forward, _chunked_backward)
