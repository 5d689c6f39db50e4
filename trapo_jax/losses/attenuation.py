"""Cross-entropy whose gradient is scaled by an attenuation of the token's probability.

"Reverse-KL-attenuated clipping" in one place: `grad loss = attenuation(p) * grad(-log p)` with
`attenuation(p)` in `[0, 1]`. TrSFT, cross-entropy, DFT and CHORD's phi differ in nothing else.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trapo_jax.losses._common import (
    Array,
    ArrayLike,
    check_not_negative,
    check_unit_interval,
    float32_where,
    zero_where_masked,
)


@dataclasses.dataclass(frozen=True)
class Attenuation:
    """An attenuation with a closed-form loss.

    Attributes:
      weight: p in [0, 1] -> gradient scale in [0, 1].
      loss: log p -> the loss with d loss / d log p = -weight(p) and loss(p = 1) = 0.
    """

    weight: Callable[[Array], Array]
    loss: Callable[[Array], Array]

    def __call__(self, probs: ArrayLike) -> Array:
        return self.weight(jnp.asarray(probs))


def clip_attenuation(alpha: ArrayLike) -> Attenuation:
    """`min(1, p / alpha)`: TrSFT (TRAPO, arXiv 2512.17636, Eq. 3). `alpha` in (0, 1]."""
    return shifted_clip_attenuation(alpha, 0.0)


def shifted_clip_attenuation(alpha: ArrayLike, shift: ArrayLike) -> Attenuation:
    """`p / (max(p, alpha) + shift)`; `alpha` in (0, 1], `shift` >= 0.

    `shift = 0` is TrSFT; with `alpha` below every p it is LUFFY's `p / (p + shift)`. The loss is
    `log((1 + shift) / (p + shift))` above alpha, continued below it by its tangent.

    Raises:
      ValueError: if `alpha` or `shift` is out of range.
    """
    check_unit_interval("alpha", alpha)
    check_not_negative("shift", shift)

    def weight(probs):
        return probs / (jnp.maximum(probs, alpha) + shift)

    def loss(logprobs):
        probs = jnp.exp(logprobs)
        # For shift = 0 the logarithm is log p itself, exact where p underflows to 0.
        unshifted = isinstance(shift, (int, float)) and shift == 0
        inside = jnp.where(probs >= alpha, probs, alpha)  # a log of 0 is NaN in the gradient
        above = -logprobs if unshifted else jnp.log1p(shift) - jnp.log(inside + shift)
        tangent = jnp.log((1 + shift) / (alpha + shift)) + (alpha - probs) / (alpha + shift)
        return jnp.where(probs >= alpha, above, tangent)

    return Attenuation(weight, loss)


def unit_attenuation() -> Attenuation:
    """`1`: plain cross-entropy, loss `-log p`."""
    return Attenuation(jnp.ones_like, jnp.negative)


def probability_attenuation() -> Attenuation:
    """`p`: Dynamic Fine-Tuning (DFT), loss `1 - p`."""
    return Attenuation(lambda probs: probs, lambda logprobs: 1.0 - jnp.exp(logprobs))


def variance_attenuation() -> Attenuation:
    """`p (1 - p)`: the token weight of CHORD-phi, loss `(1 - p)^2 / 2`."""
    return Attenuation(
        lambda probs: probs * (1.0 - probs), lambda logprobs: 0.5 * (1.0 - jnp.exp(logprobs)) ** 2
    )


def attenuated_cross_entropy_from_logprobs(
    logprobs: ArrayLike,
    *,
    attenuation: Callable[[Array], Array],
    where: ArrayLike | None = None,
) -> Array:
    """Per-token loss whose gradient is the cross-entropy's times `attenuation(p)`.

    `d loss / d logprob = -attenuation(p)`, `p = exp(logprob)`

    Args:
      logprobs: `[...]` log-probabilities of the expert's tokens, in `[-inf, 0]`.
      attenuation: p -> gradient scale in [0, 1]. The `*_attenuation` functions of this module
        bring their closed-form loss: the value is then that loss, 0 at p = 1, and every
        derivative is true. For any other callable no closed form is known: the value is
        `-attenuation(p) * logprob` with the attenuation held constant, which has the right
        gradient but is not its integral; do not read a curve of it as progress.
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
        values = jnp.where(weight == 0, 0.0, -weight * logprobs)  # 0 * inf is 0 here
    return zero_where_masked(values, where)
