"""Defines `Method`: the data and pure functions that the training loop uses.

In each step, `micro_groups_at` determines how a problem's rollouts are guided. After the rollouts have been sampled and
graded, `select` turns them into updates: it chooses the rollouts that become rows, their advantages, and the prefixes
to train on (see `selection.py`). The `terms` form the objective of every update; their weights are computed on the host
for each step. `family.py` lists the built-in methods, and `make.py` builds the method that a config names.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from trapo_jax.methods.selection import Sampled, Selection, train_all
from trapo_jax.types import ExpertPart, MicroGroup, Moment, PrefixBoundary, Problem, TokenKind

Normalizer = Literal["token_mean", "sequence_mean", "constant_sum", "constant_mean"]
Vary = Callable[[tuple[MicroGroup, ...], Moment, Problem], tuple[MicroGroup, ...]]


class TokenInputs(NamedTuple):
    """The inputs of a token loss. Arrays are `[B, T - 1]`, with one element per predicted token."""

    logprobs: jax.Array  # float32, differentiable
    old_logprobs: jax.Array  # float32, under the old policy; see `make_train_step`
    ref_logprobs: Any  # float32, under the initial model; None unless `Method.needs_reference`
    advantages: jax.Array  # float32
    where: jax.Array  # bool, tokens of the term's kinds
    entropies: (
        jax.Array
    )  # float32, entropy of the policy's distribution at the token, differentiable
    segment_ids: jax.Array  # int32, the same for all tokens of a rollout; 0 for padding
    num_segments: int  # exclusive upper bound on segment ids


TokenLoss = Callable[[TokenInputs], jax.Array]  # per-token values


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A scalar that varies over the run as a function of `Moment`, and its formula as text."""

    at: Callable[[Moment], float]
    formula: str

    def times(self, factor: float) -> "Schedule":
        """Returns the schedule multiplied by a factor."""
        return Schedule(lambda moment: factor * self.at(moment), f"{factor:g} * ({self.formula})")


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the objective: `weight * sum(loss values on tokens of the given kinds) / denominator`."""

    name: str
    kinds: tuple[TokenKind, ...]
    loss: TokenLoss
    weight: float | Schedule
    normalizer: Normalizer
    formula: str

    def weight_at(self, moment: Moment) -> float:
        return self.weight.at(moment) if isinstance(self.weight, Schedule) else self.weight


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with its own optimizer state and learning-rate schedule.

    A stage ends when the first of its limits is reached. The last stage has no limits; it ends with the run.

    Attributes:
      name: name shown to the user.
      share: maximum length of the stage as a fraction of the run, in [0, 1], measured in the unit of the run's budget.
      num_steps: maximum number of steps.
      patience: the stage ends after this many consecutive validations without a new minimum of the cross-entropy on the
        validation problems' expert solutions.
      learning_rate, warmup_steps, decay_start, final_learning_rate_ratio: override the fields of the same names in the
        `train` section of the config; None uses the config's value. A fraction of the run in the config is a fraction
        of the stage here.
    """

    name: str
    share: float = 1.0
    num_steps: int | None = None
    patience: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    decay_start: float | None = None
    final_learning_rate_ratio: float | None = None


def unvaried(
    micro_groups: tuple[MicroGroup, ...], moment: Moment, problem: Problem
) -> tuple[MicroGroup, ...]:
    """Returns `micro_groups` unchanged, regardless of the position in the run and the problem."""
    del moment, problem
    return micro_groups


@dataclasses.dataclass(frozen=True)
class Method:
    """The guidance, selection, and objective of a method.

    Attributes:
      name: name shown to the user.
      micro_groups: the micro-groups of a group, in order; their sizes determine the maximum group size.
      terms: the terms of the objective.
      source: the paper or code that the method comes from.
      vary: returns the micro-groups for a position in the run and a problem.
      prefix_boundary, second_expert_last, always_samples: see `Guidance`.
      expert_part: which part of an expert's text is the expert solution.
      select: builds the updates of a step from its rollouts, and returns them with the method's new state.
      stages: the stages of a run, in order. Each begins with new optimizer states.
      optimizers: names of the optimizer states that `Update.optimizer` can refer to; the first is the default.
      extra_rows_per_problem: number of expert rows, from separately drawn problems, in addition to a problem's
        rollouts.
      buffer_size: maximum number of rows in an update on buffered problems instead of the step's problems.
      needs_reference: whether a term uses log-probabilities under the initial model.
      max_applied_grad_norm: updates with a larger gradient norm are skipped.
      depends_on_length: whether guidance, selection, or weights depend on the length of the run.
      alpha: trust-region bound used by the metrics.
      clip_low, clip_high: bounds on the policy ratio used by the metrics.
      hyperparameters: the method's resolved hyperparameters, keyed by name.
      published: the source's settings that belong to other sections of the config.
      notes: additional information about the formulas, one sentence each.
    """

    name: str
    micro_groups: tuple[MicroGroup, ...]
    terms: tuple[Term, ...]
    source: str = ""
    vary: Vary = unvaried
    prefix_boundary: PrefixBoundary = "exact"
    second_expert_last: bool = False
    always_samples: bool = False
    expert_part: ExpertPart = "thought"
    select: Callable[[Sampled], Selection] = train_all
    stages: tuple[Stage, ...] = (Stage("main"),)
    optimizers: tuple[str, ...] = ("main",)
    extra_rows_per_problem: int = 0
    buffer_size: int = 0
    needs_reference: bool = False
    max_applied_grad_norm: float = math.inf
    depends_on_length: bool = False
    alpha: float = 0.1
    clip_low: float | None = None
    clip_high: float | None = None
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def group_size(self) -> int:
        """Maximum number of rollouts per problem."""
        return sum(group.size for group in self.micro_groups)

    @property
    def needs_rewards(self) -> bool:
        """Whether rewards matter, because rollouts are sampled or their guidance depends on earlier rewards."""
        return self.guidance_varies or any(group.ratio < 1 for group in self.micro_groups)

    @property
    def uses_experts(self) -> bool:
        """Whether expert solutions are used, as prefixes or as trained tokens."""
        is_guided = self.guidance_varies or any(group.ratio > 0 for group in self.micro_groups)
        return is_guided or any(term.kinds == (TokenKind.EXPERT_TRAINED,) for term in self.terms)

    @property
    def guidance_varies(self) -> bool:
        """Whether the micro-groups depend on the position in the run or on the problem."""
        return self.vary is not unvaried

    @property
    def needs_expert_loss(self) -> bool:
        """Whether the end of a stage depends on the loss on the validation problems' expert solutions."""
        return any(stage.patience is not None for stage in self.stages[:-1])

    def micro_groups_at(self, moment: Moment, problem: Problem) -> tuple[MicroGroup, ...]:
        return self.vary(self.micro_groups, moment, problem)

    def max_rows(self, problems_per_step: int, num_mini_batches: int = 1) -> int:
        """Returns the maximum number of rows in an optimizer batch. This number determines the shape of all batches."""
        rows_per_problem = self.group_size + self.extra_rows_per_problem
        return max(-(-problems_per_step * rows_per_problem // num_mini_batches), self.buffer_size)

    def coefficients(
        self, moment: Moment, *, learning_rate: float, max_grad_norm: float = math.inf
    ) -> dict[str, np.float32]:
        """Returns the scheduled scalars of an update. As traced inputs, they can change without recompilation."""
        weights = {term.name: np.float32(term.weight_at(moment)) for term in self.terms}
        rates = {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm}
        return {**weights, **{name: np.float32(value) for name, value in rates.items()}}
