"""Defines the hyperparameters of methods as typed, validated, documented fields that several methods can share.

Every method is a frozen pydantic model: its fields are the hyperparameters, and `make` builds the `Method`. The fields
are the single source of truth for the names, defaults, ranges, and help texts of the hyperparameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
from pydantic import Field

from trapo_jax.methods import terms
from trapo_jax.methods.method import Method, Normalizer, Term
from trapo_jax.methods.selection import Advantages, Sampled, Selection, train_signal
from trapo_jax.types import TokenKind

Count = Annotated[int, Field(ge=1, le=2**16)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]


class Hyperparameters(pydantic.BaseModel):
    """The hyperparameters of a method.

    To write your own method, define a subclass with fields that have defaults and docstrings, and implement `make`.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def make(self) -> Method:
        """Returns the method with these hyperparameters."""
        raise NotImplementedError(f"{type(self).__name__} must implement make")

    def resolved(self) -> dict[str, Any]:
        """Returns the hyperparameters, keyed by name, with values derived from other hyperparameters filled in."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class NormalizedHyperparameters(Hyperparameters):
    """Hyperparameters of methods with a configurable normalizer for token losses."""

    normalizer: Normalizer | None = None
    """Denominator for the sum of token losses; null selects each term's default normalizer."""

    def normalize_by(self, default: Normalizer) -> Normalizer:
        """Returns the configured normalizer, or a term's default if none is configured."""
        return self.normalizer or default


class ExpertHyperparameters(NormalizedHyperparameters):
    """Hyperparameters of methods with a loss on expert tokens."""

    expert_weight: Weight = 1.0
    """Weight of the loss on expert tokens."""


class PolicyGradientHyperparameters(NormalizedHyperparameters):
    """Hyperparameters of methods with a policy gradient on completion tokens."""

    clip_low: Share | None = None
    """The ratio of the new to the old policy is clipped from below at 1 - clip_low; null for no lower bound."""
    clip_high: Weight | None = None
    """The ratio of the new to the old policy is clipped from above at 1 + clip_high; null for no upper bound."""
    kl_weight: Weight = 0.0
    """Weight of the KL divergence (k3 estimate) from the initial model. A nonzero weight keeps that model in memory."""
    scale_advantages_by_std: bool = False
    """Divide a group's advantages by their standard deviation."""
    entropy_weight: Weight = 0.0
    """Weight of the entropy bonus, which is the mean entropy over completion tokens and trained expert tokens."""
    skip_zero_advantages: bool = False
    """Exclude rollouts with zero advantage and no trained prefix from the losses and from their denominators."""

    entropy_kinds: ClassVar[tuple[TokenKind, ...]] = (
        TokenKind.COMPLETION,
        TokenKind.EXPERT_TRAINED,
    )

    def advantages(self, over: Callable[..., np.ndarray]) -> Advantages:
        """Returns the function that computes a group's advantages."""
        return partial(over, scale_by_std=self.scale_advantages_by_std)

    def selecting(self, select: Callable[[Sampled], Selection]) -> Callable[[Sampled], Selection]:
        """Returns `select`, modified to exclude rollouts without a gradient if `skip_zero_advantages` is set."""
        return partial(train_signal, select=select) if self.skip_zero_advantages else select

    def completion_terms(
        self, normalizer: Normalizer = "constant_mean", *, weight: terms.Weight = 1.0
    ) -> tuple[Term, ...]:
        """Returns the policy-gradient term and the regularizers."""
        policy_gradient = terms.policy_gradient(
            self.normalize_by(normalizer),
            weight=weight,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return (policy_gradient, *self.regularizers(normalizer))

    def regularizers(self, normalizer: Normalizer = "constant_mean") -> tuple[Term, ...]:
        """Returns the terms for the KL divergence and the entropy bonus, omitting a term whose weight is zero."""
        regularizers = []
        if self.kl_weight:
            regularizers.append(terms.divergence(self.kl_weight, self.normalize_by(normalizer)))
        if self.entropy_weight:
            regularizers.append(terms.entropy_bonus(self.entropy_weight, self.entropy_kinds))
        return tuple(regularizers)

    def method_fields(self) -> dict[str, Any]:
        """Returns the fields of `Method` that are derived from these hyperparameters."""
        return {
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "needs_reference": self.kl_weight > 0,
        }


class MixedHyperparameters(PolicyGradientHyperparameters, ExpertHyperparameters):
    """Hyperparameters of methods that learn from both completions and expert tokens."""


class MicroBatchedSftHyperparameters(MixedHyperparameters):
    """Hyperparameters of methods whose released code adds the mean SFT loss of every micro-batch.

    That code does not divide the policy gradient by the number of rows: each micro-batch contributes
    `sum(-A * rho) / L + mean(-log p)`, and the loss is the sum over all micro-batches. Here, that sum is divided by the
    number of rows, so the SFT loss has weight 1 / (rows per micro-batch). The released code fills micro-batches up to
    32,768 tokens, so the number of rows depends on the row lengths: with an average of 1,536 tokens per row, a
    micro-batch has 64 / 3 rows.
    """

    micro_batch_rows: Annotated[float, Field(ge=1.0, le=1e6)] = 64 / 3
    """Rows per micro-batch in the released code; the weight of the SFT loss is divided by this number."""

    @property
    def sft_weight(self) -> float:
        """Weight of the SFT loss, which is averaged over tokens."""
        return self.expert_weight / self.micro_batch_rows


MICRO_BATCH_NOTE = (
    "the SFT loss is the mean over the batch's expert tokens; the released code averages within each "
    "micro-batch"
)
