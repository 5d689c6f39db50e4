"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal

import jax.numpy as jnp

from trapo_jax.losses._common import Array, ArrayLike, float32_where, zero_where_masked

KLEstimator = Literal["k1", "k2", "k3"]


def kl_penalty(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    *,
    estimator: KLEstimator = "k3",
    where: ArrayLike | None = None,
) -> Array:
    """Estimate of KL(policy || reference) at tokens drawn from the policy.

    With `d = logprob - ref_logprob`::

        k1 = d                      unbiased, may be negative
        k2 = d^2 / 2                biased, low variance; its gradient is that of the KL
        k3 = exp(-d) - 1 + d        unbiased, never negative (GRPO's)

    Args:
      logprobs: `[...]` of the sampled tokens under the policy.
      ref_logprobs: `[...]` under the reference; pass it through `stop_gradient` if it is computed
        from trained parameters.
      estimator: one of the three.
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced.

    Raises:
      ValueError: if `estimator` is none of the three.

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
        values = jnp.expm1(-difference) + difference
    else:
        raise ValueError(f"estimator must be one of 'k1', 'k2', 'k3', got {estimator!r}")
    return zero_where_masked(values, where)
