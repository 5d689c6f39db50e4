"""TrSFT: supervised fine-tuning inside a trust region (TRAPO, arXiv 2512.17636, Section 3.2).

Differences from the paper and its released code:

- The released code minimizes `-p / max(stop_gradient(p), alpha)`. It has the gradient of Eq. 3, but its value is -1 for
  all p >= alpha, so the value does not show progress. Here, the loss is the integral of Eq. 3, which has the same
  gradient and decreases as the model learns.
- Proposition 1 assumes that some lambda satisfies `lambda = sum {p_E : p_E > alpha * lambda}`. If a class lies on the
  boundary, there is no such lambda; `trsft_optimum` returns the minimizer in that case, too.
"""

import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, check_unit_interval
from trapo_jax.losses.attenuation import attenuated_cross_entropy_from_logprobs, clip_attenuation
from trapo_jax.losses.logprobs import token_logprobs


def trsft_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the TrSFT loss: cross-entropy with a reduced gradient outside the trust region.

    With `p = softmax(logits)[label]`::

        loss = -log p                       if p >= alpha
             = 1 - log(alpha) - p / alpha   if p <  alpha
        d loss = -1 / max(p, alpha) * dp    (cross-entropy's gradient times min(1, p / alpha))

    Args:
      logits: `[..., V, ...]` with the vocabulary at `axis`; any float dtype; converted to float32.
      labels: integers in `[0, V)`, with the shape of `logits` without `axis`; out-of-range labels give NaN.
      alpha: trust-region bound in (0, 1]. The loss approaches cross-entropy for alpha -> 0 and is `1 - p` for
        alpha = 1.
      axis: the vocabulary axis of `logits`.
      where: boolean, broadcastable to `labels`; False gives exactly 0 and no gradient,
        regardless of the logits and labels.

    Returns:
      float32 with the shape of `labels`, unreduced, in `[0, 1 - log(alpha)]`.

    Raises:
      ValueError: if `alpha` is not in (0, 1].

    References:
      TRAPO, arXiv 2512.17636, Eq. 3.

    Example:
      >>> trsft_loss(jnp.array([[0.0, 9.0]]), jnp.array([0]), alpha=0.1).round(3)
      Array([3.301], dtype=float32)
    """
    logprobs = token_logprobs(logits, labels, axis=axis, where=where)
    return trsft_loss_from_logprobs(logprobs, alpha=alpha, where=where)


def trsft_loss_from_logprobs(
    logprobs: ArrayLike, *, alpha: ArrayLike = 0.1, where: ArrayLike | None = None
) -> Array:
    """Computes `trsft_loss` from the log-probabilities of the labels.

    Args:
      logprobs: `[...]`, log-probabilities of the expert's tokens, in `[-inf, 0]`.
      alpha: trust-region bound in (0, 1].
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced, in `[0, 1 - log(alpha)]`.

    Raises:
      ValueError: if `alpha` is not in (0, 1].
    """
    return attenuated_cross_entropy_from_logprobs(
        logprobs, attenuation=clip_attenuation(alpha), where=where
    )


def trsft_optimum(expert_probs: ArrayLike, *, alpha: float) -> tuple[Array, Array]:
    """Returns the policy that minimizes the expected TrSFT loss of a tabular expert (Proposition 1).

    ::

        lambda = min over k >= 1 of max(S_k, p_(k+1) / alpha)
        p*(c)  = p_E(c) / lambda      if p_E(c) > alpha * lambda
               = the remaining mass   if p_E(c) = alpha * lambda   (shared equally among ties)
               = 0                    if p_E(c) < alpha * lambda

    where `p_(k)` is the k-th largest expert probability and `S_k` is the sum of the k largest. The expert's weak modes
    are pruned, and the others are renormalized. Usually, lambda is the kept mass `S_k`, as in the paper. If a class
    lies on the boundary (`alpha S_k < p_(k+1) <= alpha S_(k+1)`), no kept mass satisfies Proposition 1, and that class
    gets the remaining mass, which is in [0, alpha].

    Args:
      expert_probs: `[V]`, nonnegative, summing to 1.
      alpha: trust-region bound in (0, 1].

    Returns:
      `(probs, lambda_)`: float32 `[V]` summing to 1, and float32 `[]` in (0, 1].

    Raises:
      ValueError: if `alpha` is not in (0, 1].

    Example:
      >>> probs, lambda_ = trsft_optimum(jnp.array([0.6, 0.36, 0.04]), alpha=0.1)
      >>> [f"{x:.3f}" for x in (*probs, lambda_)]
      ['0.625', '0.375', '0.000', '0.960']
    """
    check_unit_interval("alpha", alpha)
    expert_probs = jnp.asarray(expert_probs, jnp.float32)
    descending = jnp.sort(expert_probs, descending=True)
    next_largest = jnp.append(descending[1:], 0.0)
    cutoff = jnp.min(jnp.maximum(alpha * jnp.cumsum(descending), next_largest))
    lambda_ = cutoff / alpha
    kept = jnp.where(expert_probs > cutoff, expert_probs / lambda_, 0.0)
    on_boundary = expert_probs == cutoff
    rest = jnp.maximum(0.0, 1.0 - jnp.sum(kept)) / jnp.maximum(1, jnp.sum(on_boundary))
    return jnp.where(on_boundary, rest, kept), lambda_
