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
from typing import Literal

import jax

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    policy_gradient_loss,
    trsft_loss_from_logprobs,
    unit_attenuation,
)
from trapo_jax.types import MicroGroup, TokenKind

MethodName = Literal["trapo", "grpo", "sft"]
Preset = Literal["paper", "reference"]
Normalizer = Literal["token_mean", "sequence_mean", "constant_sum", "constant_mean"]

# (logprobs, advantages, where) -> per-token values
TokenLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
) -> Method:
    """The named method with its constants.

    Args:
      name: which method.
      preset: TRAPO's guidance, as in the paper or as in the released code.
      alpha: TrSFT's trust-region bound in (0, 1].
      expert_weight: weight of the expert term.
      normalizer: of every term; None for the method's own.
    """
    if name == "trapo":
        reference = preset == "reference"
        return Method(
            name=name,
            micro_groups=MICRO_GROUPS[preset],
            prefix_boundary="paragraph" if reference else "exact",
            second_expert_last=reference,
            terms=(
                _own_term(normalizer or "constant_mean"),
                Term(
                    name="trsft",
                    kind=TokenKind.EXPERT_TRAINED,
                    loss=lambda logprobs, _, where: trsft_loss_from_logprobs(
                        logprobs, alpha=alpha, where=where
                    ),
                    weight=expert_weight,
                    normalizer=normalizer or "constant_mean",
                    formula="-log p if p >= alpha else 1 - log(alpha) - p / alpha",
                ),
            ),
            alpha=alpha,
            source="TRAPO, arXiv 2512.17636",
        )
    if name == "grpo":
        return Method(
            name=name,
            micro_groups=(MicroGroup(GROUP_SIZE, 0.0, NEVER),),
            prefix_boundary="exact",
            second_expert_last=False,
            terms=(_own_term(normalizer or "constant_mean"),),
            alpha=alpha,
            source="GRPO as in TRAPO's comparison, arXiv 2512.17636, Table 1",
        )
    cross_entropy = Term(
        name="cross_entropy",
        kind=TokenKind.EXPERT_TRAINED,
        loss=lambda logprobs, _, where: attenuated_cross_entropy_from_logprobs(
            logprobs, attenuation=unit_attenuation(), where=where
        ),
        weight=expert_weight,
        normalizer=normalizer or "token_mean",
        formula="-log p",
    )
    return Method(
        name=name,
        micro_groups=(MicroGroup(1, 1.0, ALWAYS),),
        prefix_boundary="exact",
        second_expert_last=False,
        terms=(cross_entropy,),
        alpha=alpha,
        source="supervised fine-tuning on the expert's solutions",
    )


def _own_term(normalizer: Normalizer) -> Term:
    """The policy gradient on own tokens. One update a batch: pi_old is the policy itself."""
    return Term(
        name="policy_gradient",
        kind=TokenKind.COMPLETION,
        loss=lambda logprobs, advantages, where: policy_gradient_loss(
            logprobs, jax.lax.stop_gradient(logprobs), advantages, where=where
        ),
        weight=1.0,
        normalizer=normalizer,
        formula="-A * pi / pi_old",
    )
