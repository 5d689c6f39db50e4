"""Selects training rows from the rollouts of a step, with pure functions that run on the host, without JAX.

`Sampled` holds the rollouts with their rewards and the method's state. `Selection` holds the updates to perform, in
order, and the method's new state. The state must be JSON-serializable, since it is part of checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trapo_jax.methods.advantages import group_advantages
from trapo_jax.types import (
    Completion,
    FinishReason,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
    TrainRow,
)

Group = Sequence[Rollout]


class Sampled(NamedTuple):
    """The rollouts of a step, and other inputs that a method may use to select updates.

    Attributes:
      groups: the rollouts of each problem, ordered by `sample_index`.
      moment: the current position in the run.
      state: the method's state; {} at the start of a run.
      extra_problems: problems with expert solutions, drawn in addition to the step's problems
        (`Method.extra_rows_per_problem`).
      problems: all training problems, keyed by id.
      max_completion_length: maximum number of trained tokens per expert solution.
    """

    groups: Sequence[Group]
    moment: Moment
    state: Mapping[str, Any]
    extra_problems: Sequence[Problem]
    problems: Mapping[str, Problem]
    max_completion_length: int


class Update(NamedTuple):
    """One update of the policy.

    Attributes:
      rows: the rows to train on.
      optimizer: the optimizer whose state is used, one of `Method.optimizers`.
      learning_rate_scale: multiplier for the run's learning rate.
      max_grad_norm: bound on the gradient's global norm; None for the run's bound.
    """

    rows: list[TrainRow]
    optimizer: str = "main"
    learning_rate_scale: float = 1.0
    max_grad_norm: float | None = None


class Selection(NamedTuple):
    """The updates of a step, in order, and the method's new state."""

    updates: list[Update]
    state: Mapping[str, Any]


Advantages = Callable[[Group], np.ndarray]  # float32 [G]
Carriers = Callable[[Group], list[bool]]


def advantages_over_group(group: Group, *, scale_by_std: bool = False) -> np.ndarray:
    """Returns `r_j - mean(r)` over all rollouts of the group, guided or not."""
    rewards = np.array([rollout.reward for rollout in group])
    return group_advantages(rewards, scale_by_std=scale_by_std)


def no_advantages(group: Group) -> np.ndarray:
    """Returns zeros, for methods without a policy gradient. Rewards may be missing."""
    return np.zeros(len(group), np.float32)


def advantages_over_sampled(group: Group, *, scale_by_std: bool = False) -> np.ndarray:
    """Returns `r_j - mean(r)` over the rollouts with sampled tokens, and 0 for the others."""
    sampled = np.array([bool(rollout.completion.token_ids) for rollout in group])
    advantages = np.zeros(len(group), np.float32)
    if sampled.any():
        rewards = np.array([rollout.reward for rollout in group])
        advantages[sampled] = group_advantages(rewards[sampled], scale_by_std=scale_by_std)
    return advantages


def first_of_each_prefix(group: Group) -> list[bool]:
    """Marks the first rollout with each distinct expert prefix. Only this rollout has a loss on the prefix."""
    seen: set[tuple[int, int]] = set()
    carries = []
    for rollout in group:
        prefix = (rollout.request.expert_index, rollout.request.prefix_len)
        carries.append(rollout.request.prefix_len > 0 and prefix not in seen)
        seen.add(prefix)
    return carries


def no_prefix(group: Group) -> list[bool]:
    """Marks no rollout, so that prefixes serve only as context."""
    return [False] * len(group)


def rows_of_group(group: Group, advantages: np.ndarray, carriers: Sequence[bool]) -> list[TrainRow]:
    """Returns one row per rollout."""
    return [
        TrainRow(rollout.completion, float(advantage), carries, rollout.request.key)
        for rollout, advantage, carries in zip(group, advantages, carriers, strict=True)
    ]


def expert_row(problem: Problem, max_completion_length: int) -> TrainRow:
    """Returns the problem's first expert solution as a row, truncated to `max_completion_length` tokens."""
    prefix_len = min(len(problem.experts[0].token_ids), max_completion_length)
    request = RolloutRequest(problem, 0, 0, 0, prefix_len, 1.0)
    return TrainRow(Completion(request, (), (), FinishReason.NOT_SAMPLED), 0.0, True)


def train_all(
    sampled: Sampled,
    *,
    advantages: Advantages = advantages_over_group,
    carriers: Carriers = first_of_each_prefix,
) -> Selection:
    """Selects one update with every rollout."""
    rows = [
        row
        for group in sampled.groups
        for row in rows_of_group(group, advantages(group), carriers(group))
    ]
    return Selection([Update(rows)], sampled.state)


def train_signal(sampled: Sampled, *, select: Callable[[Sampled], Selection]) -> Selection:
    """Selects the same updates as `select`, without rollouts that have zero advantage and no trained prefix.

    These rollouts have no policy gradient. They are also excluded from the denominators of the losses.
    """
    updates, state = select(sampled)
    return Selection(
        [
            update._replace(rows=[row for row in update.rows if row.advantage or row.trains_expert])
            for update in updates
        ],
        state,
    )


def train_all_beside_experts(sampled: Sampled, *, advantages: Advantages) -> Selection:
    """CHORD: selects one update with every rollout and with the extra problems' expert solutions."""
    rows = train_all(sampled, advantages=advantages).updates[0].rows
    extra = [expert_row(p, sampled.max_completion_length) for p in sampled.extra_problems]
    return Selection([Update([*rows, *extra])], sampled.state)


def expert_instead_of_unsolved(
    sampled: Sampled, *, gate: float, advantages: Advantages
) -> Selection:
    """HPT: replaces a problem's rollouts with one expert solution if the sum of their rewards is at most `gate`."""
    rows = []
    for group in sampled.groups:
        problem = group[0].request.problem
        if problem.experts and sum(rollout.reward for rollout in group) <= gate:
            rows.append(expert_row(problem, sampled.max_completion_length))
        else:
            rows += rows_of_group(group, advantages(group), no_prefix(group))
    return Selection([Update(rows)], sampled.state)


def buffer_unsolved(
    sampled: Sampled,
    *,
    buffer_size: int,
    learning_rate_scale: float,
    max_grad_norm: float | None,
    advantages: Advantages,
) -> Selection:
    """ReLIFT: selects an update with every rollout, and buffers the problems that no rollout solved.

    Once `buffer_size` problems are buffered, a second update with a separate optimizer state trains on the expert
    solutions of the newest `buffer_size` problems. The method's state is `{"unsolved": problem ids}`, with the newest
    step's ids first.
    """
    (update,), _ = train_all(sampled, advantages=advantages, carriers=no_prefix)
    updates = [update._replace(max_grad_norm=max_grad_norm)]
    new = [
        group[0].request.problem.id
        for group in sampled.groups
        if group[0].request.problem.experts and not any(rollout.reward for rollout in group)
    ]
    unsolved = [*new, *sampled.state.get("unsolved", [])]
    if len(unsolved) >= buffer_size:
        newest = [sampled.problems[id_] for id_ in unsolved[:buffer_size]]
        rows = [expert_row(problem, sampled.max_completion_length) for problem in newest]
        updates.append(Update(rows, "buffer", learning_rate_scale))
        unsolved = unsolved[buffer_size:]
    return Selection(updates, {"unsolved": unsolved})


def signs_for_sampled(group: Group, *, advantages: Advantages) -> np.ndarray:
    """SRFT: replaces the advantage of sampled rollouts with +1 for full reward and -1 otherwise."""
    values = advantages(group)
    for j, rollout in enumerate(group):
        if rollout.completion.token_ids:
            values[j] = 1.0 if rollout.reward == 1.0 else -1.0
    return values
