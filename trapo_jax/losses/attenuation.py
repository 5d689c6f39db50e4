"""Cross-entropy whose gradient is scaled by an attenuation, a function of the token's probability.

`grad loss = attenuation(p) * grad(-log p)` with `attenuation(p)` in `[0, 1]`. TrSFT, cross-entropy, DFT, and CHORD-phi
differ only in the attenuation.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import (
    Array,
    ArrayLike,
    check_fraction,
    check_unit_interval,
    float32_where,
    zero_where_masked,
)


@dataclasses.dataclass(frozen=True)
class Attenuation:
    """An attenuation with a closed-form loss.

    Attributes:
      weight: maps p in [0, 1] to the gradient scale in [0, 1].
      loss: maps log p to a loss with d loss / d log p = -weight(p) and loss(p = 1) = 0.
    """

    weight: Callable[[Array], Array]
    loss: Callable[[Array], Array]

    def __call__(self, probs: ArrayLike) -> Array:
        return self.weight(jnp.asarray(probs))


def clip_attenuation(alpha: ArrayLike) -> Attenuation:
    """Returns `min(1, p / alpha)`, the attenuation of TrSFT (TRAPO, arXiv 2512.17636, Eq. 3); `alpha` in (0, 1].

    The loss is `-log p` for p >= alpha, and the tangent to `-log p` at p = alpha for smaller p.

    Raises:
      ValueError: if `alpha` is out of range.
    """
    check_unit_interval("alpha", alpha)

    def weight(probs):
        return probs / jnp.maximum(probs, alpha)

    def loss(logprobs):
        probs = jnp.exp(logprobs)
        tangent = -jnp.log(alpha) + (alpha - probs) / alpha
        return jnp.where(probs >= alpha, -logprobs, tangent)

    return Attenuation(weight, loss)


def shifted_clip_attenuation(alpha: ArrayLike, shift: ArrayLike) -> Attenuation:
    """Returns `min(1, p / alpha) - shift * p`; `alpha` in (0, 1], `shift` in [0, 1].

    High-probability tokens have a smaller gradient than in TrSFT, which corresponds to shift 0. TRAPO's released code
    offers this attenuation with shift 0.5 as `clip_low_and_shift`. The loss is `clip_attenuation`'s loss minus
    `shift * (1 - p)`.

    Raises:
      ValueError: if `alpha` or `shift` is out of range.
    """
    check_fraction("shift", shift)
    clip = clip_attenuation(alpha)
    return Attenuation(
        lambda probs: clip.weight(probs) - shift * probs,
        lambda logprobs: clip.loss(logprobs) - shift * (1.0 - jnp.exp(logprobs)),
    )


def unit_attenuation() -> Attenuation:
    """Returns the constant 1, the attenuation of cross-entropy, with loss `-log p`."""
    return Attenuation(jnp.ones_like, jnp.negative)


def probability_attenuation() -> Attenuation:
    """Returns `p`, the attenuation of Dynamic Fine-Tuning (DFT), with loss `1 - p`."""
    return Attenuation(lambda probs: probs, lambda logprobs: 1.0 - jnp.exp(logprobs))


def variance_attenuation() -> Attenuation:
    """Returns `p (1 - p)`, the attenuation of CHORD-phi, with loss `(1 - p)^2 / 2`."""
    return Attenuation(
        lambda probs: probs * (1.0 - probs), lambda logprobs: 0.5 * (1.0 - jnp.exp(logprobs)) ** 2
    )


def attenuated_cross_entropy_from_logprobs(
    logprobs: ArrayLike,
    *,
    attenuation: Callable[[Array], Array],
    where: ArrayLike | None = None,
) -> Array:
    """Computes a cross-entropy loss whose gradient is scaled by `attenuation(p)`.

    `d loss / d logprob = -attenuation(p)`, `p = exp(logprob)`

    Args:
      logprobs: `[...]`, log-probabilities of the expert's tokens, in `[-inf, 0]`.
      attenuation: maps p to the gradient scale in [0, 1]. An `Attenuation`, as returned by the `*_attenuation`
        functions in this module, comes with a closed-form loss that is 0 at p = 1 and has correct derivatives of every
        order. For any other callable, the value is `-stop_gradient(attenuation(p)) * logprob`. Its gradient is correct,
        but its value is not the integral of the gradient and does not measure progress.
      where: boolean, broadcastable to `logprobs`; False gives exactly 0 and no gradient.

    Returns:
      float32 `[...]`, unreduced.

    References:
      TRAPO, arXiv 2512.17636, Eq. 3.

    Example:
      >>> loss = attenuated_cross_entropy_from_logprobs(
      ...     jnp.log(jnp.array([0.5, 0.01])), attenuation=clip_attenuation(0.1))
      >>> loss.round(3)
      Array([0.693, 3.203], dtype=float32)
    """
    logprobs = float32_where(logprobs, where)
    if isinstance(attenuation, Attenuation):
        values = attenuation.loss(logprobs)
    else:
        weight = jax.lax.stop_gradient(attenuation(jnp.exp(logprobs)))
        values = jnp.where(weight == 0, 0.0, -weight * logprobs)  # defines 0 * inf as 0
    return zero_where_masked(values, where)
