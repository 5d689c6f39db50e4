"""Implements micro-group guidance, which decides how much of an expert solution each rollout of a problem starts with.

This module implements Section 3.1 of the TRAPO paper (arXiv 2512.17636). The rollouts of a problem form a group, which
is divided into an ordered sequence of micro-groups. Before micro-group i starts, the mean reward of all earlier
rollouts of the problem is compared with the threshold t_i. If the mean is below the threshold, the rollouts of the
micro-group start from the expert prefix of ratio L_i; otherwise, they are unguided.

`Guidance` is a pure state machine that runs on the host and does not use JAX. Its state is an immutable value. A
`Group` keeps the state of one problem while the rollouts of that problem are collected.

Unlike in the paper, a micro-group is released as soon as its decision is certain. Since rewards lie in [0, 1], the mean
is bounded while rewards are pending. If both bounds are on the same side of the threshold, the pending rewards cannot
change the decision. The outcome is the same as when waiting for all rewards, even if some of them turn out to be
missing, because the mean of the others lies between the bounds.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from trapo_jax.types import (
    Completion,
    Grade,
    MicroGroup,
    PrefixBoundary,
    Problem,
    Rollout,
    RolloutRequest,
)

PARAGRAPH_REACH = 0.3  # Only paragraph breaks before (ratio + 0.3) * length are considered.


class GuidanceState(NamedTuple):
    """The results of one problem so far.

    Attributes:
      problem: the problem.
      rewards: reward of each rollout, in [0, 1], in the order of sample indices; None if missing or not yet observed.
      missing: sample indices of rollouts that were observed without a reward.
    """

    problem: Problem
    rewards: tuple[float | None, ...]
    missing: frozenset[int] = frozenset()

    def is_observed(self, sample_index: int) -> bool:
        return self.rewards[sample_index] is not None or sample_index in self.missing

    @property
    def is_complete(self) -> bool:
        """Whether every rollout has been observed."""
        return all(map(self.is_observed, range(len(self.rewards))))


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Determines the prefix of every rollout of a problem from the rewards so far.

    Attributes:
      micro_groups: sizes, ratios L in [0, 1] and thresholds t of the micro-groups, in order.
      max_completion_length: maximum length of prefix plus completion, in tokens; longer prefixes are truncated.
      prefix_boundary: "exact" ends the prefix at floor(L * length), where length is that of the expert solution.
        "paragraph" ends it after the first token that ends a paragraph at an index greater than floor(L * length) and
        less than (L + 0.3) * length; if there is no such token, the prefix ends at floor(L * length).
      second_expert_last: whether the last micro-group uses the second expert solution of problems that have one.
      always_samples: whether a completion is sampled after every prefix. If so, the last token of an expert solution,
        which is EOS unless the solution was truncated, is never part of a prefix.
    """

    micro_groups: tuple[MicroGroup, ...]
    max_completion_length: int
    prefix_boundary: PrefixBoundary = "exact"
    second_expert_last: bool = False
    always_samples: bool = False

    @property
    def group_size(self) -> int:
        """Number of rollouts per problem."""
        return sum(group.size for group in self.micro_groups)

    def start(self, problem: Problem) -> GuidanceState:
        """Returns the state of a problem before anything has been sampled."""
        return GuidanceState(problem, (None,) * self.group_size)

    def observe(
        self, state: GuidanceState, sample_index: int, reward: float | None
    ) -> GuidanceState:
        """Returns the state after rollout `sample_index` has been graded.

        Args:
          state: the previous state.
          sample_index: index of the rollout in its group.
          reward: reward in [0, 1]; None if it is missing. Missing rewards are excluded from all means.

        Raises:
          ValueError: if the reward is out of range or the rollout has already been observed.
        """
        if reward is not None and not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward must be in [0, 1], got {reward}")
        if state.is_observed(sample_index):
            raise ValueError(
                f"rollout {sample_index} of problem {state.problem.id} has already been observed"
            )
        if reward is None:
            return state._replace(missing=state.missing | {sample_index})
        rewards = list(state.rewards)
        rewards[sample_index] = reward
        return state._replace(rewards=tuple(rewards))

    def ready(self, state: GuidanceState) -> list[RolloutRequest]:
        """Returns the requests whose prefix is decided and which have not been observed, ordered by `sample_index`.

        They include requests that are already being sampled; the caller keeps track of submitted requests.
        """
        requests, first = [], 0
        for index, group in enumerate(self.micro_groups):
            earlier = [state.rewards[j] for j in range(first) if j not in state.missing]
            guided = is_guided(earlier, group.threshold)
            members = range(first, first + group.size)
            first += group.size
            if guided is not None:
                requests += [
                    self._request(state.problem, index, j, guided=guided)
                    for j in members
                    if not state.is_observed(j)
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
        length = len(expert.token_ids) - self.always_samples
        prefix_len = cut = math.floor(group.ratio * length)
        if self.prefix_boundary == "paragraph":
            limit = (group.ratio + PARAGRAPH_REACH) * length
            prefix_len = next((end for end in expert.paragraph_ends if cut < end - 1 < limit), cut)
        prefix_len = min(prefix_len, self.max_completion_length - self.always_samples)
        if prefix_len == 0:
            return RolloutRequest(problem, sample_index, index)
        return RolloutRequest(problem, sample_index, index, expert_index, prefix_len, group.ratio)


def is_guided(rewards: Sequence[float | None], threshold: float) -> bool | None:
    """Returns whether `mean(rewards) < threshold`, or None while pending rewards (None) could change the answer.

    The mean of an empty sequence is 0. `math.fsum` is correctly rounded, so the mean does not depend on the order of
    the rewards and is monotonic in each of them. Therefore, its bounds, for pending
    rewards that are all 0 or all 1, are exact in floating-point arithmetic.
    """
    if not rewards:
        return threshold > 0
    known = [reward for reward in rewards if reward is not None]
    num_pending = len(rewards) - len(known)
    if math.fsum([*known, *([1.0] * num_pending)]) / len(rewards) < threshold:
        return True
    if math.fsum(known) / len(rewards) >= threshold:
        return False
    return None


@dataclasses.dataclass
class Group:
    """The rollouts of one problem while they are being collected.

    Attributes:
      guidance: determines the prefix of each rollout.
      step: the optimizer step that the group is sampled for; part of the random keys.
      state: the state of the guidance.
      submitted: sample indices of the requests that `new_requests` has returned.
      rollouts: finished rollouts, keyed by sample index.
    """

    guidance: Guidance
    step: int
    state: GuidanceState
    submitted: set[int] = dataclasses.field(default_factory=set)
    rollouts: dict[int, Rollout] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, problem: Problem, guidance: Guidance, step: int) -> "Group":
        return cls(guidance, step, guidance.start(problem))

    @property
    def is_complete(self) -> bool:
        return self.state.is_complete

    def new_requests(self) -> tuple[list[RolloutRequest], list[RolloutRequest]]:
        """Returns the requests whose prefix is decided and which have not been returned before.

        Returns:
          Requests to sample, and requests whose expert prefix is the entire response.
        """
        to_sample, complete = [], []
        for request in self.guidance.ready(self.state):
            if request.sample_index not in self.submitted:
                self.submitted.add(request.sample_index)
                is_whole = is_complete(request, self.guidance.max_completion_length)
                (complete if is_whole else to_sample).append(request)
        return to_sample, complete

    def observe(self, completion: Completion, grade: Grade) -> None:
        """Adds a graded rollout."""
        index = completion.request.sample_index
        self.rollouts[index] = Rollout(completion, grade)
        self.state = self.guidance.observe(self.state, index, grade.reward)


def is_complete(request: RolloutRequest, max_completion_length: int) -> bool:
    """Returns whether the expert prefix is the entire response, so that there is nothing to sample."""
    if request.prefix_len == 0:
        return False
    expert = request.problem.experts[request.expert_index]
    return request.prefix_len >= min(len(expert.token_ids), max_completion_length)
