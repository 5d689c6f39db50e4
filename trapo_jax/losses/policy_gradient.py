"""Per-token policy-gradient losses: unclipped, PPO-clipped, GSPO, CISPO, and LUFFY's policy shaping."""

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import (
    MAX_LOG_RATIO,
    Array,
    ArrayLike,
    check_not_negative,
    check_positive,
    float32_where,
    zero_where_masked,
)


def policy_gradient_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the importance-weighted policy-gradient loss, unclipped (TRAPO) or clipped (PPO, clip-higher).

    With `rho = exp(logprob - old_logprob)`::

        loss = -A * rho                                                       without clipping
        loss = -min(A * rho, A * clip(rho, 1 - clip_low, 1 + clip_high))      with clipping

    Args:
      logprobs: `[...]`, log-probabilities of the sampled tokens under the trained policy.
      old_logprobs: `[...]`, log-probabilities under the policy before the update. No gradient flows
        through them; for the first update of a batch, pass `stop_gradient(logprobs)`. A ratio above `exp(20)` counts as
        `exp(20)` and has no gradient, so that the loss is finite.
      advantages: broadcastable to `logprobs`; no gradient flows through them.
      clip_low: in [0, 1]; rho is clipped from below at `1 - clip_low`. None for no lower bound.
      clip_high: >= 0; rho is clipped from above at `1 + clip_high`. None for no upper bound.
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced. For the first update, the value is `-A`, so only the gradient is meaningful.

    Raises:
      ValueError: if a clip bound is negative.

    References:
      Schulman et al. 2017, arXiv 1707.06347, Eq. 7; TRAPO, arXiv 2512.17636, Section 3.1.

    Example:
      >>> policy_gradient_loss(jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.4])), 1.0,
      ...                      clip_low=0.2, clip_high=0.2).round(3)
      Array([-1.2], dtype=float32)
    """
    logprobs, old_logprobs, advantages = _prepare(logprobs, old_logprobs, advantages, where)
    ratio = _exp_ratio(logprobs - old_logprobs)
    return zero_where_masked(_clipped_surrogate(ratio, advantages, clip_low, clip_high), where)


def sequence_policy_gradient_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the GSPO loss, with one importance ratio per sequence: the geometric mean of its tokens' ratios.

    `s = exp(mean over the sequence of (logprob - old_logprob))` replaces `rho` in `policy_gradient_loss`. Every token
    gets its sequence's loss, so `sequence_mean` of the result is GSPO's objective.

    Args:
      logprobs: `[..., T, ...]`, one sequence along `axis` (packed rows are not supported).
      old_logprobs: like `logprobs`; no gradient flows through them.
      advantages: broadcastable to `logprobs` and constant along `axis`; no gradient flows through them.
      clip_low, clip_high: bounds on s as in `policy_gradient_loss` (about 3e-4 in the paper).
      axis: the token axis.
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient, and excludes
        the token from the mean.

    Returns:
      float32 with the shape of `logprobs`, unreduced.

    References:
      Zheng et al. 2025, Group Sequence Policy Optimization, Eq. 5 and 7.
    """
    logprobs, old_logprobs, advantages = _prepare(logprobs, old_logprobs, advantages, where)
    mask = jnp.ones(logprobs.shape, bool) if where is None else where
    mask = jnp.broadcast_to(jnp.asarray(mask), logprobs.shape)
    num_tokens = jnp.maximum(1, jnp.sum(mask, axis=axis, keepdims=True))
    log_ratio = jnp.sum(logprobs - old_logprobs, axis=axis, keepdims=True) / num_tokens
    ratio = jnp.broadcast_to(_exp_ratio(log_ratio), logprobs.shape)
    return zero_where_masked(_clipped_surrogate(ratio, advantages, clip_low, clip_high), mask)


def cispo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Computes the CISPO loss: REINFORCE with a clipped importance weight, so that no token loses its gradient.

    `loss = -stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) * A * logprob`

    See `policy_gradient_loss` for the arguments and the return value. A log-probability of -inf gives an infinite value
    unless the token's weight or advantage is 0.

    References:
      MiniMax-M1, Section 3.1.
    """
    logprobs, old_logprobs, advantages = _prepare(logprobs, old_logprobs, advantages, where)
    low, high = _ratio_bounds(clip_low, clip_high)
    weight = jax.lax.stop_gradient(jnp.clip(_exp_ratio(logprobs - old_logprobs), low, high))
    scale = weight * advantages
    values = jnp.where(scale == 0, 0.0, -scale * logprobs)  # defines 0 * inf as 0
    return zero_where_masked(values, where)


def shaped_policy_gradient_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    gamma: float = 0.1,
    where: ArrayLike | None = None,
) -> Array:
    """Computes LUFFY's loss on expert tokens: a policy gradient shaped to favor unlikely tokens.

    `loss = -A * p / (p + gamma)`, whose gradient is `-A * gamma / (p + gamma)^2 * dp`.

    Args:
      logprobs: `[...]`, log-probabilities of the expert's tokens, in `[-inf, 0]`.
      advantages: broadcastable to `logprobs`; no gradient flows through them.
      gamma: > 0; the gradient with respect to log p is largest for p = gamma.
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced.

    Raises:
      ValueError: if `gamma` <= 0.

    References:
      LUFFY (Yan et al. 2025), policy shaping.
    """
    check_positive("gamma", gamma)
    logprobs, _, advantages = _prepare(logprobs, 0.0, advantages, where)
    probs = jnp.exp(logprobs)
    return zero_where_masked(-advantages * probs / (probs + gamma), where)


def _prepare(logprobs, old_logprobs, advantages, where) -> tuple[Array, Array, Array]:
    """Converts inputs to float32, sets masked elements to 0, and stops gradients except through `logprobs`."""
    constant = lambda x: jax.lax.stop_gradient(float32_where(x, where))
    return float32_where(logprobs, where), constant(old_logprobs), constant(advantages)


def _exp_ratio(log_ratio: Array) -> Array:
    """Returns `exp(log_ratio)`, which would otherwise overflow for implausibly large ratios (and 0 * inf is NaN)."""
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _ratio_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None:
            check_not_negative(name, bound)
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high = jnp.inf if clip_high is None else 1.0 + clip_high
    return low, high


def _clipped_surrogate(ratio, advantages, clip_low, clip_high) -> Array:
    clipped = jnp.clip(ratio, *_ratio_bounds(clip_low, clip_high))
    return -jnp.minimum(advantages * ratio, advantages * clipped)
