"""The loop in which every problem of a batch advances alone.

completions -> rewards -> scheduler -> new requests, until each group is whole. No problem waits for another,
and no micro-group for a straggler that cannot change its guidance; decoding goes on while verdicts are awaited.
The outcome does not depend on the order in which completions and verdicts arrive; but what is begun of the next
step in slots that would be idle does, where that is allowed.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import jax

from trapo_jax.distributed.processes import gather_shares
from trapo_jax.rollouts.guidance import GroupState, Scheduler
from trapo_jax.sampling import RolloutEngine
from trapo_jax.types import (
    REWARDS,
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Verdict,
)

Score = Callable[[Completion], Future[Verdict]]


@dataclasses.dataclass
class Group:
    """The rollouts of a problem on their way.

    Attributes:
      problem: what they are about.
      scheduler: decides their guidance.
      step: the optimiser step they are for, part of their random keys.
      state: the scheduler's, of the verdicts so far.
      submitted: the sample indices that the engine or the verifier has had.
      rollouts: by sample index; all of them at the end.
    """

    problem: Problem
    scheduler: Scheduler
    step: int
    state: GroupState
    submitted: set[int] = dataclasses.field(default_factory=set)
    rollouts: dict[int, Rollout] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, problem: Problem, scheduler: Scheduler, step: int) -> "Group":
        return cls(problem, scheduler, step, scheduler.start(problem))

    def new_requests(self) -> list[RolloutRequest]:
        """What is decided and was not handed out before."""
        ready = self.scheduler.ready(self.problem, self.state)
        new = [r for r in ready if r.sample_index not in self.submitted]
        self.submitted.update(r.sample_index for r in new)
        return new

    def observe(self, completion: Completion, verdict: Verdict) -> None:
        index, reward = completion.request.sample_index, REWARDS[verdict]
        self.rollouts[index] = Rollout(completion, verdict, reward)
        self.state = self.scheduler.observe(self.state, index, reward)


class Begun(NamedTuple):
    """What has been begun of a batch, for the call that collects it.

    Attributes:
      groups: by problem id.
      judging: verdicts that are awaited.
      unfinished: what the engine was sampling, see `RolloutEngine.release`; its tokens so far are kept.
    """

    groups: dict[str, Group]
    judging: dict[Future[Verdict], Completion]
    unfinished: Sequence[Completion] = ()

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        judged = [r.completion for g in self.groups.values() for r in g.rollouts.values()]
        completions = [*judged, *self.judging.values(), *self.unfinished]
        return sum(len(completion.token_ids) for completion in completions)


NOTHING_BEGUN = Begun({}, {})


class Collected(NamedTuple):
    """What `collect_rollouts` brings.

    Attributes:
      groups: for each problem its G rollouts, by `sample_index`.
      reward_secs: seconds in which the loop judged, or had nothing to decode and waited for verdicts.
      begun: of the upcoming batch; what the engine still samples of it is not among it.
    """

    groups: list[list[Rollout]]
    reward_secs: float
    begun: Begun


def collect_rollouts(
    engine: RolloutEngine,
    scheduler_of: Callable[[Problem], Scheduler],
    score: Score,
    problems: Sequence[Problem],
    *,
    step: int,
    params: SamplingParams,
    begun: Begun = NOTHING_BEGUN,
    upcoming: Sequence[Problem] = (),
) -> Collected:
    """Samples a whole group for every problem, guided as its rewards ask for.

    Args:
      engine: samples; must be idle, with the weights to sample from.
      scheduler_of: what decides the guidance of a problem.
      score: a completion's verdict, now or later.
      problems: distinct problems.
      step: the optimiser step, part of the random keys.
      params: how tokens are drawn.
      begun: of these problems; the rest of their tokens is drawn from the engine's weights as they are now.
      upcoming: problems of the next step, begun where slots would be idle, guided as these are.
    """
    if len({problem.id for problem in problems}) != len(problems):
        raise ValueError("a batch holds the same problem twice")
    groups, judging = dict(begun.groups), dict(begun.judging)
    for problem in problems:
        if problem.id not in groups:
            groups[problem.id] = Group.start(problem, scheduler_of(problem), step)
    mine = [groups[problem.id] for problem in problems]
    to_start = collections.deque(upcoming)
    reward_secs = 0.0

    def release(some: Iterable[Group]) -> None:
        """Hands new requests to the engine, or to the verifier if nothing is left to sample."""
        for group in some:
            new = group.new_requests()
            longest = group.scheduler.max_completion_length
            complete = [r for r in new if is_complete(r, longest)]
            to_sample = [r for r in new if r not in complete]
            engine.submit(to_sample, step=group.step, params=params)
            for request in complete:
                completion = Completion(request, (), (), FinishReason.NOT_SAMPLED)
                judging[score(completion)] = completion

    def take_verdicts() -> None:
        """Observes what has been judged and releases what that allows, until there is no more."""
        while done := [future for future in judging if future.done()]:
            touched: dict[str, None] = {}  # an ordered set
            for future in done:
                completion, verdict = judging.pop(future), future.result()
                id_ = completion.request.problem.id
                groups[id_].observe(completion, verdict)
                touched[id_] = None
            release(groups[id_] for id_ in touched)

    def fill_idle_slots() -> None:
        """Begins with problems of the upcoming batch; one that is in this batch too waits for its turn."""
        while to_start and engine.num_idle_slots > 0:
            problem = to_start.popleft()
            if problem.id not in groups:
                group = Group.start(problem, scheduler_of(problem), step + 1)
                groups[problem.id] = group
                release([group])

    engine.resume(begun.unfinished, step=step, params=params)
    release(mine)
    take_verdicts()
    while not all(group.state.finished for group in mine):
        fill_idle_slots()
        completions = engine.poll()
        started = time.perf_counter()
        judging.update((score(completion), completion) for completion in completions)
        if not completions and not engine.is_busy:
            if not judging:
                raise RuntimeError("the engine has lost requests")
            wait(judging, return_when=FIRST_COMPLETED)
        take_verdicts()
        reward_secs += time.perf_counter() - started
    for group in mine:
        del groups[group.problem.id]
    whole = [[group.rollouts[j] for j in sorted(group.rollouts)] for group in mine]
    return Collected(whole, reward_secs, Begun(groups, judging))


def share_rollouts(
    mine: Sequence[Sequence[Rollout]], problems: Sequence[Problem]
) -> list[list[Rollout]]:
    """The groups of all `problems`, of which every process has sampled its share."""
    if jax.process_count() == 1:
        return [list(group) for group in mine]
    groups = gather_shares([[_to_json(rollout) for rollout in group] for group in mine])
    return [
        [_from_json(record, problem) for record in group]
        for group, problem in zip(groups, problems, strict=True)
    ]


def _to_json(rollout: Rollout) -> list[Any]:
    request, completion = rollout.request, rollout.completion
    place = (request.sample_index, request.micro_group, request.expert_index, request.prefix_len)
    sampled = (completion.token_ids, completion.logprobs, completion.finish_reason)
    return [*place, request.ratio, *sampled, rollout.verdict]


def _from_json(record: list[Any], problem: Problem) -> Rollout:
    *place, token_ids, logprobs, finish_reason, verdict = record
    completion = Completion(
        RolloutRequest(problem, *place),
        tuple(token_ids),
        tuple(logprobs),
        FinishReason(finish_reason),
    )
    return Rollout(completion, Verdict(verdict), REWARDS[Verdict(verdict)])


def is_complete(request: RolloutRequest, max_completion_length: int) -> bool:
    """Whether the expert prefix is the whole response: nothing is left to sample."""
    if request.prefix_len == 0:
        return False
    whole = request.prefix_len == len(request.problem.experts[request.expert_index].token_ids)
    return whole or request.prefix_len >= max_completion_length
