"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal

import jax.numpy as jnp

from trapo_jax.losses._common import (
    MAX_LOG_RATIO,
    Array,
    ArrayLike,
    float32_where,
    zero_where_masked,
)

KLEstimator = Literal["k1", "k2", "k3"]


def kl_penalty(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    *,
    estimator: KLEstimator = "k3",
    where: ArrayLike | None = None,
) -> Array:
    """Estimates KL(policy || reference) at tokens sampled from the policy.

    With `d = logprob - ref_logprob`::

        k1 = d                      unbiased, may be negative
        k2 = d^2 / 2                biased, low variance; its expected gradient is that of the KL
        k3 = exp(-d) - 1 + d        unbiased, never negative (used by GRPO)

    k3 has no gradient where d < -20, because its value and its gradient grow exponentially.

    Args:
      logprobs: `[...]`, log-probabilities of the sampled tokens under the policy.
      ref_logprobs: `[...]`, log-probabilities under the reference; apply `stop_gradient` if they are
        computed from trained parameters.
      estimator: "k1", "k2" or "k3".
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced.

    Raises:
      ValueError: if `estimator` is unknown.

    References:
      Schulman 2020, "Approximating KL divergence".

    Example:
      >>> kl_penalty(jnp.array([-1.0]), jnp.array([-1.5])).round(4)
      Array([0.1065], dtype=float32)
    """
    difference = float32_where(logprobs, where) - float32_where(ref_logprobs, where)
    if estimator == "k1":
        values = difference
    elif estimator == "k2":
        values = 0.5 * difference**2
    elif estimator == "k3":
        difference = jnp.maximum(difference, -MAX_LOG_RATIO)
        values = jnp.expm1(-difference) + difference
    else:
        raise ValueError(f"estimator must be one of 'k1', 'k2', 'k3', got {estimator!r}")
    return zero_where_masked(values, where)
