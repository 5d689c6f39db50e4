"""From what a step has sampled to what it trains. Host only, no jax; pure functions of their arguments.

`Sampled` holds the rollouts with their rewards and the method's state, `Selection` the updates to be made, in
order, and the state afterwards. A state is what JSON can hold: it lies in the checkpoint.
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
    """What a step has sampled, and what a method may look at besides.

    Attributes:
      groups: the rollouts of each problem, by `sample_index`.
      moment: of the step.
      state: of the method, {} at the start of a run.
      extra_problems: problems with experts, drawn beside the step's own (`Method.extra_rows_per_problem`).
      problems: all training problems, by id.
      max_completion_length: tokens of an expert's solution that are trained, at most.
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
      rows: what it is made from.
      optimizer: whose state it uses, a name of `Method.optimizers`.
      learning_rate_scale: times the run's learning rate.
    """

    rows: list[TrainRow]
    optimizer: str = "main"
    learning_rate_scale: float = 1.0


class Selection(NamedTuple):
    updates: list[Update]
    state: Mapping[str, Any]


Advantages = Callable[[Group], np.ndarray]  # float32 [G]
Carriers = Callable[[Group], list[bool]]


def advantages_over_group(group: Group, *, scale_by_std: bool = False) -> np.ndarray:
    """`r_j - mean(r)` over all rollouts of the group, guided or not."""
    rewards = np.array([rollout.reward for rollout in group])
    return group_advantages(rewards, scale_by_std=scale_by_std)


def no_advantages(group: Group) -> np.ndarray:
    """Zeros, for methods without a policy gradient. The rewards may be missing."""
    return np.zeros(len(group), np.float32)


def advantages_over_sampled(group: Group, *, scale_by_std: bool = False) -> np.ndarray:
    """`r_j - mean(r)` over the rollouts in which the policy sampled; 0 for the others."""
    own = np.array([bool(rollout.completion.token_ids) for rollout in group])
    advantages = np.zeros(len(group), np.float32)
    if own.any():
        rewards = np.array([rollout.reward for rollout in group])
        advantages[own] = group_advantages(rewards[own], scale_by_std=scale_by_std)
    return advantages


def first_of_each_prefix(group: Group) -> list[bool]:
    """Whose expert prefix is trained: of the rollouts that start from the same one, the first."""
    seen: set[tuple[int, int]] = set()
    carries = []
    for rollout in group:
        prefix = (rollout.request.expert_index, rollout.request.prefix_len)
        carries.append(rollout.request.prefix_len > 0 and prefix not in seen)
        seen.add(prefix)
    return carries


def no_prefix(group: Group) -> list[bool]:
    """No expert prefix is trained: it is context."""
    return [False] * len(group)


def rows_of_group(group: Group, advantages: np.ndarray, carriers: Sequence[bool]) -> list[TrainRow]:
    """A row for each rollout."""
    return [
        TrainRow(rollout.completion, float(advantage), carries, rollout.request.key)
        for rollout, advantage, carries in zip(group, advantages, carriers, strict=True)
    ]


def expert_row(problem: Problem, max_completion_length: int) -> TrainRow:
    """The problem's first expert solution as a row, whole or cut at the maximum length."""
    prefix_len = min(len(problem.experts[0].token_ids), max_completion_length)
    request = RolloutRequest(problem, 0, 0, 0, prefix_len, 1.0)
    return TrainRow(Completion(request, (), (), FinishReason.NOT_SAMPLED), 0.0, True)


def train_all(
    sampled: Sampled,
    *,
    advantages: Advantages = advantages_over_group,
    carriers: Carriers = first_of_each_prefix,
) -> Selection:
    """One update from every rollout."""
    rows = [
        row
        for group in sampled.groups
        for row in rows_of_group(group, advantages(group), carriers(group))
    ]
    return Selection([Update(rows)], sampled.state)


def train_signal(sampled: Sampled, *, advantages: Advantages, carriers: Carriers) -> Selection:
    """One update from the rollouts with an advantage or a prefix to train; of the others nothing is learnt."""
    rows = train_all(sampled, advantages=advantages, carriers=carriers).updates[0].rows
    return Selection(
        [Update([row for row in rows if row.advantage or row.trains_expert])], sampled.state
    )


def train_all_beside_experts(sampled: Sampled, *, advantages: Advantages) -> Selection:
    """CHORD: one update from every rollout and from the extra problems' expert solutions."""
    own = train_all(sampled, advantages=advantages).updates[0].rows
    extra = [expert_row(p, sampled.max_completion_length) for p in sampled.extra_problems]
    return Selection([Update([*own, *extra])], sampled.state)


def expert_instead_of_unsolved(
    sampled: Sampled, *, gate: float, advantages: Advantages
) -> Selection:
    """HPT: a problem solved `gate` times or less gives up its rollouts for one expert solution."""
    rows = []
    for group in sampled.groups:
        problem = group[0].request.problem
        if problem.experts and sum(rollout.reward for rollout in group) <= gate:
            rows.append(expert_row(problem, sampled.max_completion_length))
        else:
            rows += rows_of_group(group, advantages(group), no_prefix(group))
    return Selection([Update(rows)], sampled.state)


def buffer_unsolved(
    sampled: Sampled, *, buffer_size: int, learning_rate_scale: float, advantages: Advantages
) -> Selection:
    """ReLIFT: an update from every rollout; problems that no rollout solved are kept for later.

    When `buffer_size` of them are kept, a second update, with an optimiser state of its own, is made from the
    experts of the oldest `buffer_size`. The state is `{"unsolved": problem ids, the oldest first}`.
    """
    updates, _ = train_all(sampled, advantages=advantages, carriers=no_prefix)
    unsolved = list(sampled.state.get("unsolved", []))
    for group in sampled.groups:
        problem = group[0].request.problem
        if problem.experts and not any(rollout.reward for rollout in group):
            unsolved.append(problem.id)
    if len(unsolved) >= buffer_size:
        taken = [sampled.problems[id_] for id_ in unsolved[:buffer_size]]
        rows = [expert_row(problem, sampled.max_completion_length) for problem in taken]
        updates.append(Update(rows, "buffer", learning_rate_scale))
        unsolved = unsolved[buffer_size:]
    return Selection(updates, {"unsolved": unsolved})


def signs_for_sampled(group: Group, *, advantages: Advantages) -> np.ndarray:
    """SRFT: own rollouts get +1 for the full reward and -1 for less, the expert its advantage."""
    values = advantages(group)
    for j, rollout in enumerate(group):
        if rollout.completion.token_ids:
            values[j] = 1.0 if rollout.reward == 1.0 else -1.0
    return values


def train_in_stages(
    sampled: Sampled, *, until: float, learning_rate_scale: float, advantages: Advantages
) -> Selection:
    """SFT, then RL: one update from everything; in the first stage with a learning rate of its own."""
    update = train_all(sampled, advantages=advantages).updates[0]
    if sampled.moment.progress < until:
        update = update._replace(learning_rate_scale=learning_rate_scale)
    return Selection([update], sampled.state)
