"""Micro-group sampling: how much of the expert each rollout of a problem starts from.

TRAPO (arXiv 2512.17636), Section 3.1. A group is made of micro-groups in order. Before micro-group i the mean
reward of all earlier rollouts of the problem decides: below the threshold t_i its rollouts start from the
expert prefix of ratio L_i, otherwise they are unguided.

Host only; imports no jax. The state is a value: it can be written as JSON, and `ready` can be asked again.

Departure from the paper: a micro-group is released as soon as its decision is certain. Rewards lie in
[0, 1], so the rewards still missing bound the mean; if both bounds fall on one side of the threshold, the
stragglers cannot change the decision. The outcome is that of waiting.
"""

import dataclasses
import math
from collections.abc import Sequence

from trapo_jax.types import MicroGroup, Problem, RolloutRequest

PREFIX_BOUNDARIES = ("exact", "paragraph")
PARAGRAPH_REACH = 0.3  # a paragraph end counts if it lies before ratio + 0.3


@dataclasses.dataclass(frozen=True)
class GroupState:
    """One problem's results so far: `rewards[j]` is None until rollout j has been observed."""

    problem_id: str
    rewards: tuple[float | None, ...]

    def to_json(self) -> dict:
        return {"problem_id": self.problem_id, "rewards": list(self.rewards)}

    @classmethod
    def from_json(cls, data: dict) -> "GroupState":
        return cls(data["problem_id"], tuple(data["rewards"]))

    @property
    def finished(self) -> bool:
        return None not in self.rewards


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Decides the guidance of every rollout from the rewards so far.

    Attributes:
      micro_groups: sizes, ratios L in [0, 1] and thresholds t, in order.
      max_completion_length: tokens of prefix + completion; a prefix is cut there.
      prefix_boundary: "exact" cuts at floor(L * length); "paragraph" at the first paragraph end after
        that, inclusive, if it lies before (L + 0.3) * length, else at floor(L * length).
      second_expert_last: the last micro-group uses the second expert where there is one.
    """

    micro_groups: tuple[MicroGroup, ...]
    max_completion_length: int
    prefix_boundary: str = "exact"
    second_expert_last: bool = False

    @property
    def group_size(self) -> int:
        return sum(group.size for group in self.micro_groups)

    def start(self, problem: Problem) -> GroupState:
        """The state of a problem of which nothing has been sampled."""
        return GroupState(problem.id, (None,) * self.group_size)

    def observe(self, state: GroupState, sample_index: int, reward: float) -> GroupState:
        """The state after rollout `sample_index` got `reward` in [0, 1]."""
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward must be in [0, 1], got {reward}")
        if state.rewards[sample_index] is not None:
            raise ValueError(f"rollout {sample_index} of {state.problem_id} was observed before")
        rewards = list(state.rewards)
        rewards[sample_index] = reward
        return dataclasses.replace(state, rewards=tuple(rewards))

    def ready(self, problem: Problem, state: GroupState) -> list[RolloutRequest]:
        """The rollouts that are decided and not yet observed, in order of `sample_index`.

        Rollouts already being sampled are among them: the caller knows what it has submitted.
        """
        requests, first = [], 0
        for index, group in enumerate(self.micro_groups):
            guided = is_guided(state.rewards[:first], group.threshold)
            members = range(first, first + group.size)
            first += group.size
            if guided is not None:
                requests += [
                    self._request(problem, index, j, guided=guided)
                    for j in members
                    if state.rewards[j] is None
                ]
        return requests

    def _request(
        self, problem: Problem, index: int, sample_index: int, *, guided: bool
    ) -> RolloutRequest:
        group = self.micro_groups[index]
        if not (guided and group.ratio > 0 and problem.experts):
            return RolloutRequest(problem, sample_index, index)
        use_second = self.second_expert_last and index == len(self.micro_groups) - 1
        expert_index = 1 if use_second and len(problem.experts) > 1 else 0
        expert = problem.experts[expert_index]
        length = len(expert.token_ids)
        prefix_len = cut = math.floor(group.ratio * length)
        if self.prefix_boundary == "paragraph":
            limit = (group.ratio + PARAGRAPH_REACH) * length
            ends = (end for end in expert.paragraph_ends if cut < end < limit)
            prefix_len = next(ends, cut)
        prefix_len = min(prefix_len, self.max_completion_length)
        if prefix_len == 0:
            return RolloutRequest(problem, sample_index, index)
        return RolloutRequest(problem, sample_index, index, expert_index, prefix_len, group.ratio)


def is_guided(rewards: Sequence[float | None], threshold: float) -> bool | None:
    """Whether `mean(rewards) < threshold`; None while the missing rewards could change the answer.

    The mean of no rewards is 0. `math.fsum` rounds correctly, hence does not depend on the order
    of the rewards and never decreases when one grows: the bounds hold to the last bit.
    """
    if not rewards:
        return threshold > 0
    known = [reward for reward in rewards if reward is not None]
    missing = len(rewards) - len(known)
    if math.fsum([*known, *([1.0] * missing)]) / len(rewards) < threshold:
        return True
    if math.fsum(known) / len(rewards) >= threshold:
        return False
    return None
