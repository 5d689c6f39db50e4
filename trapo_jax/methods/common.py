"""What every method takes, TRAPO's presets, and the checks of constants."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from trapo_jax.methods import terms
from trapo_jax.methods.guidance import NEVER
from trapo_jax.methods.method import Normalizer, Schedule, Term
from trapo_jax.methods.selection import Advantages
from trapo_jax.types import MicroGroup, UserError

Preset = Literal["paper", "reference"]
MicroGroupTable = Sequence[Sequence[float]]  # size, ratio, threshold of each

PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {
        "micro_groups": ((4, 0.0, NEVER), (2, 0.2, 0.5), (1, 0.5, 0.7), (1, 1.0, 0.9)),
        "prefix_boundary": "exact",
        "second_expert_last": False,
    },
    "reference": {
        "micro_groups": ((4, 0.0, NEVER), (2, 0.25, 2 / 4), (1, 0.5, 4 / 6), (1, 1.0, 7 / 7)),
        "prefix_boundary": "paragraph",
        "second_expert_last": True,
    },
}
PUBLISHED: dict[Preset, dict[str, Any]] = {
    "paper": {"train.problems_per_step": 128, "train.learning_rate": 5e-6},
    "reference": {
        "train.problems_per_step": 8,
        "train.learning_rate": 1e-6,
        "train.weight_decay": 0.01,
    },
}


class Common(NamedTuple):
    """What every method takes; None for the method's own.

    Attributes:
      alpha: bound of TrSFT's trust region, and of the one that the metrics look at.
      expert_weight: of the term on the expert's tokens.
      normalizer: of all terms but the entropy's.
      clip_low, clip_high: bounds on the ratio of the policy gradient, as in `policy_gradient_loss`.
      kl_weight: of the divergence from the model the run began with, at own tokens.
      scale_by_std: divide a group's advantages by their standard deviation.
      entropy_weight: of the bonus on the mean entropy at own tokens.
    """

    alpha: float = 0.1
    expert_weight: float | None = None
    normalizer: Normalizer | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    kl_weight: float | None = None
    scale_by_std: bool | None = None
    entropy_weight: float = 0.0

    def or_else(self, **defaults: Any) -> "Common":
        """The method's own values where none was given."""
        return self._replace(
            **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def normalize_by(self, normalizer: Normalizer) -> Normalizer:
        return self.normalizer or normalizer

    def advantages(self, over: Callable[..., np.ndarray]) -> Advantages:
        return partial(over, scale_by_std=bool(self.scale_by_std))

    def own_terms(
        self, normalizer: Normalizer = "constant_mean", *, weight: terms.Weight = 1.0
    ) -> tuple[Term, ...]:
        """The policy gradient, and what goes with it."""
        own = terms.policy_gradient(
            self.normalize_by(normalizer),
            weight=weight,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return (own, *self.own_extras(normalizer))

    def own_extras(self, normalizer: Normalizer = "constant_mean") -> tuple[Term, ...]:
        """Divergence and entropy bonus, where they have a weight."""
        extras = []
        if self.kl_weight:
            extras.append(terms.divergence(self.kl_weight, self.normalize_by(normalizer)))
        if self.entropy_weight:
            extras.append(terms.entropy_bonus(self.entropy_weight, terms.OWN))
        return tuple(extras)

    def of_method(self) -> dict[str, Any]:
        """The fields of `Method` that follow from these."""
        return {
            "alpha": self.alpha,
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "needs_reference": bool(self.kl_weight),
        }

    @property
    def weight(self) -> float:
        """Of the term on the expert's tokens."""
        assert self.expert_weight is not None
        return self.expert_weight


def times(factor: float | None, weight: Schedule) -> Schedule:
    """A weight that is scheduled, times a factor if there is one."""
    if factor is None:
        return weight
    return Schedule(lambda moment: factor * weight.at(moment), f"{factor:g} * ({weight.formula})")


def share(name: str, value: float) -> float:
    """The constant, if it lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"method.constants.{name}={value}: must lie between 0 and 1")
    return value


def size(name: str, value: int) -> int:
    """The constant, if it is at least 1."""
    if value < 1:
        raise UserError(f"method.constants.{name}={value}: must be at least 1")
    return value


def as_micro_groups(table: MicroGroupTable) -> tuple[MicroGroup, ...]:
    """`[size, ratio, threshold]` of each micro-group, in order."""
    way_out = "give a list of [size, ratio, threshold], sizes >= 1, ratios in [0, 1]"
    try:
        groups = tuple(MicroGroup(int(n), float(ratio), float(t)) for n, ratio, t in table)
    except (TypeError, ValueError) as error:
        raise UserError(f"method.constants.micro_groups={table!r}: {way_out}") from error
    if not groups or any(g.size < 1 or not 0 <= g.ratio <= 1 for g in groups):
        raise UserError(f"method.constants.micro_groups={table!r}: {way_out}")
    return groups
