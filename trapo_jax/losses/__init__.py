"""Losses for learning from expert solutions and from the policy's own completions, as pure functions.

The conventions follow optax: arrays come first, hyperparameters are keyword-only, `axis` is the vocabulary or token
axis, and `where` selects the elements to include. Every loss returns one unreduced float32 value per token, which is
exactly 0 for masked tokens; the reductions turn these values into a scalar. The package depends only on JAX.
"""

from trapo_jax.losses.attenuation import (
    Attenuation,
    attenuated_cross_entropy_from_logprobs,
    clip_attenuation,
    probability_attenuation,
    shifted_clip_attenuation,
    unit_attenuation,
    variance_attenuation,
)
from trapo_jax.losses.entropy_weighting import (
    entropy_weighted_cross_entropy,
    segment_mean,
    top_of_segment,
)
from trapo_jax.losses.kl import kl_penalty
from trapo_jax.losses.logprobs import entropy, linear_token_logprobs, token_logprobs
from trapo_jax.losses.policy_gradient import (
    cispo_loss,
    policy_gradient_loss,
    sequence_policy_gradient_loss,
    shaped_policy_gradient_loss,
)
from trapo_jax.losses.reductions import (
    constant_mean,
    constant_mean_weights,
    constant_sum,
    constant_sum_weights,
    segment_mean_weights,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
)
from trapo_jax.losses.trsft import trsft_loss, trsft_loss_from_logprobs, trsft_optimum

__all__ = [
    "Attenuation",
    "attenuated_cross_entropy_from_logprobs",
    "cispo_loss",
    "clip_attenuation",
    "constant_mean",
    "constant_mean_weights",
    "constant_sum",
    "constant_sum_weights",
    "entropy",
    "entropy_weighted_cross_entropy",
    "kl_penalty",
    "linear_token_logprobs",
    "policy_gradient_loss",
    "probability_attenuation",
    "segment_mean",
    "segment_mean_weights",
    "sequence_mean",
    "sequence_mean_weights",
    "sequence_policy_gradient_loss",
    "shaped_policy_gradient_loss",
    "shifted_clip_attenuation",
    "token_logprobs",
    "token_mean",
    "token_mean_weights",
    "top_of_segment",
    "trsft_loss",
    "trsft_loss_from_logprobs",
    "trsft_optimum",
    "unit_attenuation",
    "variance_attenuation",
]
