"""Builds the terms of the objectives. Each term applies a pure loss function to the tokens of one or more kinds.

In the formulas, p is the probability of a token, A is the advantage of its rollout, rho is the policy ratio
pi / pi_old, H is an entropy, and sg is stop_gradient.

The methods in `micro_grouped.py`, `mixed.py`, `scheduled.py`, and `family.py` list their terms in `Method.terms`. To
give a loss function additional inputs, add them to `TokenInputs` in `method.py` and compute them in
`training/train_step.py`.
"""

import jax
import jax.numpy as jnp

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    entropy_weighted_cross_entropy,
    kl_penalty,
    policy_gradient_loss,
    segment_mean,
    shaped_policy_gradient_loss,
    top_of_segment,
    trsft_loss_from_logprobs,
    unit_attenuation,
    variance_attenuation,
)
from trapo_jax.methods.method import Normalizer, Schedule, Term, TokenInputs
from trapo_jax.types import TokenKind

COMPLETION, EXPERT = TokenKind.COMPLETION, TokenKind.EXPERT_TRAINED
Weight = float | Schedule


def policy_gradient(
    normalizer: Normalizer,
    *,
    weight: Weight = 1.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Term:
    """Returns the policy gradient on completion tokens, clipped if a bound is set."""
    clipped = clip_low is not None or clip_high is not None
    return Term(
        name="policy_gradient",
        kinds=(COMPLETION,),
        loss=lambda x: policy_gradient_loss(
            x.logprobs,
            x.old_logprobs,
            x.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            where=x.where,
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-min(A * rho, A * clip(rho, 1 - clip_low, 1 + clip_high))"
        if clipped
        else "-A * rho",
    )


def divergence(weight: float, normalizer: Normalizer) -> Term:
    """Returns the k3 estimate of KL(policy || initial model) on completion tokens."""
    return Term(
        name="kl",
        kinds=(COMPLETION,),
        loss=lambda x: kl_penalty(x.logprobs, x.ref_logprobs, estimator="k3", where=x.where),
        weight=weight,
        normalizer=normalizer,
        formula="pi_ref / pi - log(pi_ref / pi) - 1",
    )


def entropy_bonus(weight: float, kinds: tuple[TokenKind, ...], name: str = "entropy") -> Term:
    """Returns the negative mean entropy over trained tokens."""
    return Term(
        name=name,
        kinds=kinds,
        loss=lambda x: jnp.where(x.where, -x.entropies, 0.0),
        weight=weight,
        normalizer="token_mean",
        formula="-H",
    )


def trsft(alpha: float, weight: Weight, normalizer: Normalizer) -> Term:
    """TRAPO: cross-entropy with a reduced gradient outside the trust region."""
    return Term(
        name="trsft",
        kinds=(EXPERT,),
        loss=lambda x: trsft_loss_from_logprobs(x.logprobs, alpha=alpha, where=x.where),
        weight=weight,
        normalizer=normalizer,
        formula="-log p if p >= alpha else 1 - log(alpha) - p / alpha",
    )


def cross_entropy(weight: Weight, normalizer: Normalizer) -> Term:
    """SFT: cross-entropy on expert tokens."""
    return Term(
        name="cross_entropy",
        kinds=(EXPERT,),
        loss=lambda x: attenuated_cross_entropy_from_logprobs(
            x.logprobs, attenuation=unit_attenuation(), where=x.where
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-log p",
    )


def variance_weighted_cross_entropy(weight: Weight, normalizer: Normalizer) -> Term:
    """CHORD-phi: cross-entropy whose gradient is scaled by p (1 - p)."""
    return Term(
        name="phi_cross_entropy",
        kinds=(EXPERT,),
        loss=lambda x: attenuated_cross_entropy_from_logprobs(
            x.logprobs, attenuation=variance_attenuation().weight, where=x.where
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-log p * sg[p * (1 - p)]",
    )


def shaped_policy_gradient(gamma: float, weight: Weight, normalizer: Normalizer) -> Term:
    """LUFFY: the policy gradient on expert tokens, shaped to favor unlikely tokens."""
    return Term(
        name="shaped_policy_gradient",
        kinds=(EXPERT,),
        loss=lambda x: shaped_policy_gradient_loss(
            x.logprobs, x.advantages, gamma=gamma, where=x.where
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-A * p / (p + gamma)",
    )


def _mean_entropy(x: TokenInputs) -> jax.Array:
    """Returns, for each token, the mean entropy over the tokens of its rollout to which the term applies."""
    return segment_mean(x.entropies, x.segment_ids, num_segments=x.num_segments, where=x.where)


def confident_cross_entropy(weight: Weight, normalizer: Normalizer) -> Term:
    """SRFT: cross-entropy on expert solutions, with less weight if the policy is uncertain about the solution."""
    return Term(
        name="confident_cross_entropy",
        kinds=(EXPERT,),
        loss=lambda x: entropy_weighted_cross_entropy(
            x.logprobs, _mean_entropy(x), sign=-1.0, where=x.where
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-e^(-sg H) * log p, where H is the solution's mean entropy",
    )


def own_successes(weight: Weight, normalizer: Normalizer) -> Term:
    """SRFT: cross-entropy on completions with full reward, with more weight if the policy is uncertain."""

    def loss(x: TokenInputs) -> jax.Array:
        where = x.where & (x.advantages > 0)
        return entropy_weighted_cross_entropy(x.logprobs, _mean_entropy(x), sign=1.0, where=where)

    return Term(
        name="own_successes",
        kinds=(COMPLETION,),
        loss=loss,
        weight=weight,
        normalizer=normalizer,
        formula="-e^(sg H) * log p if r = 1, where H is the completion's mean entropy",
    )


def own_failures(weight: Weight, normalizer: Normalizer) -> Term:
    """SRFT: reduces the likelihood of completions without full reward."""
    return Term(
        name="own_failures",
        kinds=(COMPLETION,),
        loss=lambda x: jnp.where(x.where & (x.advantages < 0), x.logprobs, 0.0),
        weight=weight,
        normalizer=normalizer,
        formula="log p if r < 1",
    )


def uncertain_prefix_policy_gradient(
    top_share: float, weight: Weight, normalizer: Normalizer
) -> Term:
    """Prefix-RFT: the policy gradient on the prefix tokens with the highest entropy."""

    def loss(x: TokenInputs) -> jax.Array:
        where = top_of_segment(
            jax.lax.stop_gradient(x.entropies), x.segment_ids, share=top_share, where=x.where
        )
        return policy_gradient_loss(x.logprobs, x.old_logprobs, x.advantages, where=where)

    return Term(
        name="prefix_policy_gradient",
        kinds=(EXPERT,),
        loss=loss,
        weight=weight,
        normalizer=normalizer,
        formula="-A * rho on the fraction top_entropy_share of prefix tokens with the highest entropy",
    )
