"""TRAPO and other methods with micro-groups: the ablations in the paper's Table 2, and a variant from this project.

The sizes, ratios, and thresholds of the micro-groups determine how many rollouts are guided; `rollouts/guidance.py`
compares mean rewards with the thresholds. Methods with a fixed number of guided rollouts are in `mixed.py` and
`scheduled.py`.
"""

from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from trapo_jax.methods import selection, terms
from trapo_jax.methods.guidance import NEVER
from trapo_jax.methods.hyperparameters import (
    Count,
    ExpertHyperparameters,
    PolicyGradientHyperparameters,
    Share,
    Weight,
)
from trapo_jax.methods.method import Method, Term
from trapo_jax.types import MicroGroup, PrefixBoundary

Alpha = Annotated[float, Field(ge=1e-6, le=1.0)]
Preset = Literal["paper", "reference"]
MicroGroupTable = tuple[
    tuple[Count, Share, float], ...
]  # (size, ratio, threshold) of each micro-group


class PresetValues(NamedTuple):
    """The guidance of a preset, and published settings that belong to other sections of the config."""

    micro_groups: MicroGroupTable
    prefix_boundary: PrefixBoundary
    second_expert_last: bool
    published: dict[str, Any]


PRESETS: dict[Preset, PresetValues] = {
    "paper": PresetValues(
        ((4, 0.0, NEVER), (2, 0.2, 0.5), (1, 0.5, 0.7), (1, 1.0, 0.9)),
        "exact",
        True,
        {"train.problems_per_step": 128, "train.learning_rate": 5e-6},
    ),
    "reference": PresetValues(
        ((4, 0.0, NEVER), (2, 0.25, 2 / 4), (1, 0.5, 4 / 6), (1, 1.0, 7 / 7)),
        "paragraph",
        True,
        {"train.problems_per_step": 8, "train.learning_rate": 1e-6, "train.weight_decay": 0.01},
    ),
}


class MicroGrouped(PolicyGradientHyperparameters):
    """Base class of methods with TRAPO's micro-groups, with or without a loss on expert tokens."""

    preset: Preset = "paper"
    """Guidance of the paper or of the released code ("reference"); other hyperparameters can override parts of it."""
    micro_groups: Annotated[MicroGroupTable, Field(min_length=1)] | None = None
    """[size, ratio, threshold] of each micro-group, in order; null uses the preset's value."""
    prefix_boundary: PrefixBoundary | None = None
    """Where an expert prefix ends: at the exact token or at the end of a paragraph; null uses the preset's value."""
    second_expert_last: bool | None = None
    """Whether the last micro-group uses a problem's second expert solution; null uses the preset's value."""

    def resolved(self) -> dict[str, Any]:
        preset = PRESETS[self.preset]
        hyperparameters = super().resolved()
        return {
            name: getattr(preset, name) if value is None and name in PresetValues._fields else value
            for name, value in hyperparameters.items()
        }

    def expert_terms(self) -> tuple[Term, ...]:
        """Returns the terms of the objective that apply to expert tokens."""
        return ()

    source: ClassVar[str]

    def make(self) -> Method:
        hyperparameters = self.resolved()
        expert_terms = self.expert_terms()
        carriers = selection.first_of_each_prefix if expert_terms else selection.no_prefix
        advantages = self.advantages(selection.advantages_over_group)
        return Method(
            name="",
            micro_groups=tuple(MicroGroup(*row) for row in hyperparameters["micro_groups"]),
            prefix_boundary=hyperparameters["prefix_boundary"],
            second_expert_last=hyperparameters["second_expert_last"],
            select=self.selecting(
                partial(selection.train_all, advantages=advantages, carriers=carriers)
            ),
            terms=(*self.completion_terms(), *expert_terms),
            source=self.source,
            published=PRESETS[self.preset].published,
            **self.method_fields(),
        )


class MicroGroupGrpo(MicroGrouped):
    """TRAPO's guidance without a loss on expert tokens, which serve only as context."""

    source = "micro-groups alone, an ablation from the TRAPO paper (arXiv 2512.17636, Table 2)"


class MicroGroupSft(MicroGrouped, ExpertHyperparameters):
    """TRAPO's guidance with plain cross-entropy on expert tokens."""

    source = "micro-groups and a plain SFT loss, an ablation from the TRAPO paper (arXiv 2512.17636, Table 2)"

    def expert_terms(self) -> tuple[Term, ...]:
        normalizer = self.normalize_by("constant_mean")
        return (terms.cross_entropy(self.expert_weight, normalizer),)


class MicroGroupLuffy(MicroGrouped, ExpertHyperparameters):
    """TRAPO's guidance with LUFFY's loss on expert tokens, weighted by the advantage of the row that trains them."""

    source = "micro-groups and LUFFY's loss, an ablation from the TRAPO paper (arXiv 2512.17636, Table 2)"

    gamma: Weight = 0.1
    """Shaping constant gamma of LUFFY's loss, -A p / (p + gamma)."""

    def expert_terms(self) -> tuple[Term, ...]:
        normalizer = self.normalize_by("constant_mean")
        return (terms.shaped_policy_gradient(self.gamma, self.expert_weight, normalizer),)


class Trapo(MicroGrouped, ExpertHyperparameters):
    """TRAPO: micro-groups, and TrSFT on expert tokens (Sections 3.1 to 3.3, Table 5)."""

    source = "TRAPO, arXiv 2512.17636"

    alpha: Alpha = 0.1
    """Trust-region bound of TrSFT; expert tokens with a lower probability have a reduced gradient."""

    def expert_terms(self) -> tuple[Term, ...]:
        normalizer = self.normalize_by("constant_mean")
        return (terms.trsft(self.alpha, self.expert_weight, normalizer),)

    def method_fields(self) -> dict[str, Any]:
        return {**super().method_fields(), "alpha": self.alpha}


class TrapoPlus(PolicyGradientHyperparameters, ExpertHyperparameters):
    """A variant of TRAPO that uses either the whole expert solution or none of it, and skips rows without a gradient.

    A group has `num_rollouts` unguided rollouts. If their mean reward is below `threshold`, the whole expert solution
    is added. With `skip_zero_advantages`, a problem that all rollouts solve contributes no trained tokens, so a run
    with a budget of trained tokens takes more steps.
    """

    skip_zero_advantages: bool = True
    """Exclude rollouts with zero advantage and no trained prefix from the losses and from their denominators."""

    num_rollouts: Count = 7
    """Unguided rollouts per problem."""
    threshold: Share = 0.5
    """The expert solution is used if the mean reward of the rollouts is below this value."""
    alpha: Alpha = 0.1
    """Trust-region bound of TrSFT; expert tokens with a lower probability have a reduced gradient."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=(
                MicroGroup(self.num_rollouts, 0.0, NEVER),
                MicroGroup(1, 1.0, self.threshold),
            ),
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
            ),
            terms=(
                *self.completion_terms(),
                terms.trsft(self.alpha, self.expert_weight, self.normalize_by("constant_mean")),
            ),
            source="TRAPO, arXiv 2512.17636, modified in this project (see docs/comparison.md)",
            alpha=self.alpha,
            **self.method_fields(),
        )
