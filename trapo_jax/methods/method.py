"""What a method is: data and pure functions that the one training loop asks.

A step goes like this. `micro_groups_at` says how a problem's rollouts are guided. When they have been sampled and
judged, `select` turns them into updates: which rollouts become rows, with which advantage, and whose prefix is
trained. The `terms` are the objective of every update; their weights are worked out on the host for the moment.
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
    """What a loss may look at, each `[B, T - 1]` but the last: one entry a predicted token."""

    logprobs: jax.Array  # float32, differentiable
    old_logprobs: jax.Array  # float32, before the batch's first update; see `ratio_to`
    ref_logprobs: (
        Any  # float32, of the model the run began with; None unless `Method.needs_reference`
    )
    advantages: jax.Array  # float32
    where: jax.Array  # bool, tokens of the term's kind
    entropies: jax.Array  # float32, of the policy's distribution at the token, differentiable
    segment_ids: jax.Array  # int32, tokens of one rollout have one id; 0 in the pad
    num_segments: int  # above every id


TokenLoss = Callable[[TokenInputs], jax.Array]  # per-token values


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that depends on the moment, and its formula."""

    at: Callable[[Moment], float]
    formula: str

    def times(self, factor: float) -> "Schedule":
        """Returns the schedule multiplied by a factor."""
        return Schedule(lambda moment: factor * self.at(moment), f"{factor:g} * ({self.formula})")


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the objective: `weight * sum(values where kind) / denominator`."""

    name: str
    kind: TokenKind
    loss: TokenLoss
    weight: float | Schedule
    normalizer: Normalizer
    formula: str

    def weight_at(self, moment: Moment) -> float:
        return self.weight.at(moment) if isinstance(self.weight, Schedule) else self.weight


def unvaried(
    micro_groups: tuple[MicroGroup, ...], moment: Moment, problem: Problem
) -> tuple[MicroGroup, ...]:
    """The same guidance for every problem at every moment."""
    del moment, problem
    return micro_groups


@dataclasses.dataclass(frozen=True)
class Method:
    """Guidance, selection and objective of a method.

    Attributes:
      name: for people.
      micro_groups: of a group, in order; no group is ever larger than these.
      terms: the objective.
      source: where the method comes from.
      vary: the micro-groups of a moment and a problem.
      prefix_boundary, second_expert_last: see `Guidance`.
      expert_part: which part of an expert's text is the expert solution.
      select: what is trained of what was sampled, and the method's state afterwards.
      optimizers: names of the optimiser states that `Update.optimizer` chooses among, the usual one first.
      extra_rows_per_problem: rows of experts beside a problem's rollouts, whose problems are drawn anew.
      buffer_size: rows of an update that does not come from the step's own problems, at most.
      needs_reference: a term looks at the log-probabilities of the model the run began with.
      max_applied_grad_norm: an update with a larger gradient is skipped.
      depends_on_length: guidance, selection or weights depend on the length of the run.
      alpha: bound of the trust region that the metrics look at.
      clip_low, clip_high: bounds on the policy ratio that the metrics look at.
      constants: by name, what `make_method` was given or took by default.
      published: settings of the source that belong to other sections of the config.
      notes: what a reader of the formulas should know besides, one sentence each.
    """

    name: str
    micro_groups: tuple[MicroGroup, ...]
    terms: tuple[Term, ...]
    source: str = ""
    vary: Vary = unvaried
    prefix_boundary: PrefixBoundary = "exact"
    second_expert_last: bool = False
    expert_part: ExpertPart = "thought"
    select: Callable[[Sampled], Selection] = train_all
    optimizers: tuple[str, ...] = ("main",)
    extra_rows_per_problem: int = 0
    buffer_size: int = 0
    needs_reference: bool = False
    max_applied_grad_norm: float = math.inf
    depends_on_length: bool = False
    alpha: float = 0.1
    clip_low: float | None = None
    clip_high: float | None = None
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def group_size(self) -> int:
        """Rollouts of a problem, at most."""
        return sum(group.size for group in self.micro_groups)

    @property
    def needs_rewards(self) -> bool:
        """Whether rewards matter: rollouts are sampled, or guided by the rewards of others."""
        return self.guidance_varies or any(group.ratio < 1 for group in self.micro_groups)

    @property
    def uses_experts(self) -> bool:
        """Whether expert solutions matter: as prefixes, or as tokens that are trained."""
        is_guided = self.guidance_varies or any(group.ratio > 0 for group in self.micro_groups)
        return is_guided or any(term.kind is TokenKind.EXPERT_TRAINED for term in self.terms)

    @property
    def guidance_varies(self) -> bool:
        """Whether the micro-groups depend on the moment or the problem."""
        return self.vary is not unvaried

    def micro_groups_at(self, moment: Moment, problem: Problem) -> tuple[MicroGroup, ...]:
        return self.vary(self.micro_groups, moment, problem)

    def max_rows(self, problems_per_step: int) -> int:
        """Rows of one update, at most: batches of all steps have one shape."""
        rows_per_problem = self.group_size + self.extra_rows_per_problem
        return max(problems_per_step * rows_per_problem, self.buffer_size)

    def coefficients(self, moment: Moment, *, learning_rate: float) -> dict[str, np.float32]:
        """The numbers that an update is given as data, so that no change of them compiles anything anew."""
        weights = {term.name: np.float32(term.weight_at(moment)) for term in self.terms}
        return {**weights, "learning_rate": np.float32(learning_rate)}
