"""The family of methods as data: guidance, and the terms of the objective.

A method says which rollouts start from how much of the expert (`micro_groups`) and which loss falls on which
kind of token (`terms`). It has no loop of its own.

Sources: TRAPO arXiv 2512.17636 (Sections 3.1 to 3.3, Table 5); GRPO as the paper compares with it: the same
step without guidance, advantages not divided by the standard deviation.

Departures from the paper, and why:

- Token losses are divided by rows x max_completion_length (`constant_mean`). The paper leaves the
  normaliser open; this one makes a token count the same whatever the batch's other lengths are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    kl_penalty,
    policy_gradient_loss,
    trsft_loss_from_logprobs,
    unit_attenuation,
)
from trapo_jax.types import MicroGroup, TokenKind

MethodName = Literal["trapo", "grpo", "sft"]
Preset = Literal["paper", "reference"]
Normalizer = Literal["token_mean", "sequence_mean", "constant_sum", "constant_mean"]


class TokenInputs(NamedTuple):
    """What a loss may look at, each `[B, T - 1]`: one entry a predicted token."""

    logprobs: jax.Array  # float32, differentiable
    old_logprobs: jax.Array  # float32, before the batch's first update
    ref_logprobs: (
        Any  # float32, of the model the run began with; None unless `Method.needs_reference`
    )
    advantages: jax.Array  # float32
    where: jax.Array  # bool, tokens of the term's kind


TokenLoss = Callable[[TokenInputs], jax.Array]  # per-token values


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the objective: `weight * sum(values where kind) / denominator`."""

    name: str
    kind: TokenKind
    loss: TokenLoss
    weight: float
    normalizer: Normalizer
    formula: str


@dataclasses.dataclass(frozen=True)
class Method:
    """Guidance and objective of a method; see `Scheduler` for the first four fields."""

    name: str
    micro_groups: tuple[MicroGroup, ...]
    prefix_boundary: str
    second_expert_last: bool
    terms: tuple[Term, ...]
    alpha: float
    clip_low: float | None
    clip_high: float | None
    needs_reference: bool
    source: str

    @property
    def group_size(self) -> int:
        return sum(group.size for group in self.micro_groups)


ALWAYS, NEVER = 2.0, -1.0  # thresholds that every mean of rewards in [0, 1] is below, above

MICRO_GROUPS: dict[Preset, tuple[MicroGroup, ...]] = {
    "paper": (
        MicroGroup(4, 0.0, NEVER),
        MicroGroup(2, 0.2, 0.5),
        MicroGroup(1, 0.5, 0.7),
        MicroGroup(1, 1.0, 0.9),
    ),
    "reference": (
        MicroGroup(4, 0.0, NEVER),
        MicroGroup(2, 0.25, 2 / 4),
        MicroGroup(1, 0.5, 4 / 6),
        MicroGroup(1, 1.0, 7 / 7),
    ),
}
GROUP_SIZE = 8


def make_method(
    name: MethodName,
    *,
    preset: Preset = "paper",
    alpha: float = 0.1,
    expert_weight: float = 1.0,
    normalizer: Normalizer | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    kl_weight: float = 0.0,
) -> Method:
    """The named method with its constants.

    Args:
      name: which method.
      preset: TRAPO's guidance, as in the paper or as in the released code.
      alpha: TrSFT's trust-region bound in (0, 1].
      expert_weight: weight of the expert term.
      normalizer: of every term; None for the method's own.
      clip_low, clip_high: bounds on the ratio of the policy gradient, as in `policy_gradient_loss`.
      kl_weight: of the divergence from the model the run began with, at own tokens.
    """
    constants: dict[str, Any] = {
        "name": name,
        "alpha": alpha,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "needs_reference": kl_weight > 0 and name != "sft",
    }
    if name == "sft":
        return Method(
            micro_groups=(MicroGroup(1, 1.0, ALWAYS),),
            prefix_boundary="exact",
            second_expert_last=False,
            terms=(_cross_entropy_term(expert_weight, normalizer or "token_mean"),),
            source="supervised fine-tuning on the expert's solutions",
            **constants,
        )
    normalizer = normalizer or "constant_mean"
    own_terms = (_own_term(clip_low, clip_high, normalizer),)
    if kl_weight:
        own_terms += (_kl_term(kl_weight, normalizer),)
    if name == "grpo":
        return Method(
            micro_groups=(MicroGroup(GROUP_SIZE, 0.0, NEVER),),
            prefix_boundary="exact",
            second_expert_last=False,
            terms=own_terms,
            source="GRPO as in TRAPO's comparison, arXiv 2512.17636, Table 1",
            **constants,
        )
    reference = preset == "reference"
    return Method(
        micro_groups=MICRO_GROUPS[preset],
        prefix_boundary="paragraph" if reference else "exact",
        second_expert_last=reference,
        terms=(*own_terms, _trsft_term(alpha, expert_weight, normalizer)),
        source="TRAPO, arXiv 2512.17636",
        **constants,
    )


def _own_term(clip_low: float | None, clip_high: float | None, normalizer: Normalizer) -> Term:
    clipped = clip_low is not None or clip_high is not None
    return Term(
        name="policy_gradient",
        kind=TokenKind.COMPLETION,
        loss=lambda x: policy_gradient_loss(
            x.logprobs,
            x.old_logprobs,
            x.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            where=x.where,
        ),
        weight=1.0,
        normalizer=normalizer,
        formula="-min(A * rho, A * clip(rho, 1 - clip_low, 1 + clip_high))"
        if clipped
        else "-A * rho",
    )


def _kl_term(weight: float, normalizer: Normalizer) -> Term:
    return Term(
        name="kl",
        kind=TokenKind.COMPLETION,
        loss=lambda x: kl_penalty(x.logprobs, x.ref_logprobs, estimator="k3", where=x.where),
        weight=weight,
        normalizer=normalizer,
        formula="pi_ref / pi - log(pi_ref / pi) - 1",
    )


def _trsft_term(alpha: float, weight: float, normalizer: Normalizer) -> Term:
    return Term(
        name="trsft",
        kind=TokenKind.EXPERT_TRAINED,
        loss=lambda x: trsft_loss_from_logprobs(x.logprobs, alpha=alpha, where=x.where),
        weight=weight,
        normalizer=normalizer,
        formula="-log p if p >= alpha else 1 - log(alpha) - p / alpha",
    )


def _cross_entropy_term(weight: float, normalizer: Normalizer) -> Term:
    return Term(
        name="cross_entropy",
        kind=TokenKind.EXPERT_TRAINED,
        loss=lambda x: attenuated_cross_entropy_from_logprobs(
            x.logprobs, attenuation=unit_attenuation(), where=x.where
        ),
        weight=weight,
        normalizer=normalizer,
        formula="-log p",
    )
