"""Collects rollouts asynchronously: every problem in a batch advances independently.

Completions are graded, rewards update the guidance, and the guidance releases new requests until every group is
complete. No problem waits for another, and no micro-group waits for a rollout that cannot change its guidance.
Decoding continues while grades are pending. The result does not depend on the order in which completions and grades
arrive, except that rollouts of the next step, which are started early in otherwise idle slots, may advance more or
less.
"""

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import jax

from trapo_jax.distributed.processes import gather_shares
from trapo_jax.rollouts.guidance import Group, Guidance
from trapo_jax.sampling.engine import RolloutEngine
from trapo_jax.types import (
    Completion,
    FinishReason,
    Grade,
    Judgment,
    Problem,
    Rollout,
    RolloutRequest,
    SamplingParams,
)

# Maximum time to wait for a grade before progress is reported again.
GRADE_WAIT_SECS = 1.0

GradeFunction = Callable[[Completion], Future[Grade]]


class PartialRollouts(NamedTuple):
    """Rollouts of the next step that have been started early.

    Attributes:
      groups: rollout groups, keyed by problem id.
      pending_grades: completions with pending grades, keyed by future.
      unfinished: partial completions that the engine was still sampling.
    """

    groups: Mapping[str, Group] = {}
    pending_grades: Mapping[Future[Grade], Completion] = {}
    unfinished: Sequence[Completion] = ()

    @property
    def num_sampled_tokens(self) -> int:
        """Number of tokens sampled so far."""
        graded = [r.completion for g in self.groups.values() for r in g.rollouts.values()]
        completions = [*graded, *self.pending_grades.values(), *self.unfinished]
        return sum(len(completion.token_ids) for completion in completions)


class CollectedGroups(NamedTuple):
    """The result of `collect_groups`.

    Attributes:
      groups: the G rollouts of each problem, ordered by `sample_index`.
      grading_secs: seconds spent processing grades, or waiting for them while there was nothing to decode.
      partial: rollouts of upcoming problems, except rollouts that the engine is still sampling.
    """

    groups: list[list[Rollout]]
    grading_secs: float
    partial: PartialRollouts


def collect_groups(
    engine: RolloutEngine,
    guidance_of: Callable[[Problem], Guidance],
    grade: GradeFunction,
    problems: Sequence[Problem],
    *,
    step: int,
    params: SamplingParams,
    partial: PartialRollouts | None = None,
    upcoming: Sequence[Problem] = (),
    on_graded: Callable[[int], None] = lambda _: None,
) -> CollectedGroups:
    """Samples a complete group of rollouts for every problem.

    Args:
      engine: the rollout engine; must be idle and have the weights to sample from.
      guidance_of: returns the guidance of a problem.
      grade: grades a completion asynchronously.
      problems: distinct problems.
      step: the optimizer step, starting at 1; part of the random keys.
      params: sampling parameters.
      partial: rollouts of these problems that were started during the previous step. Their remaining tokens are
        sampled with the engine's current weights. None if there are no such rollouts.
      upcoming: problems of the next step, which may be started in slots that would otherwise be idle.
      on_graded: called before each engine step with the number of rollouts of `problems` that have been graded
        since the last call. It may raise an exception to end the collection.

    Raises:
      ValueError: if the problems are not distinct.
    """
    if len({problem.id for problem in problems}) != len(problems):
        raise ValueError("a batch contains the same problem twice")
    collector = _Collector(engine, guidance_of, grade, step, params, partial or PartialRollouts())
    return collector.collect(problems, upcoming, on_graded)


class _Collector:
    """Advances the groups of one step; see `collect_groups`."""

    def __init__(
        self,
        engine: RolloutEngine,
        guidance_of: Callable[[Problem], Guidance],
        grade: GradeFunction,
        step: int,
        params: SamplingParams,
        partial: PartialRollouts,
    ):
        self._engine, self._guidance_of, self._grade = engine, guidance_of, grade
        self._step, self._params = step, params
        self._groups = dict(partial.groups)
        self._pending_grades = dict(partial.pending_grades)
        self._unfinished = partial.unfinished

    def collect(
        self,
        problems: Sequence[Problem],
        upcoming: Sequence[Problem],
        on_graded: Callable[[int], None],
    ) -> CollectedGroups:
        for problem in problems:
            if problem.id not in self._groups:
                self._groups[problem.id] = self._start(problem, self._step)
        current = [self._groups[problem.id] for problem in problems]
        queue = collections.deque(upcoming)
        grading_secs, num_graded = 0.0, 0
        self._engine.resume(self._unfinished, step=self._step, params=self._params)
        self._release(current)
        self._take_grades()
        while not all(group.is_complete for group in current):
            num_before, num_graded = num_graded, sum(len(group.rollouts) for group in current)
            on_graded(num_graded - num_before)
            self._fill_idle_slots(queue)
            completions = self._engine.step()
            started = time.perf_counter()
            self._pending_grades.update((self._grade(c), c) for c in completions)
            if not completions and not self._engine.is_busy:
                if not self._pending_grades:
                    raise RuntimeError("the rollout engine lost requests")
                wait(self._pending_grades, GRADE_WAIT_SECS, return_when=FIRST_COMPLETED)
            self._take_grades()
            grading_secs += time.perf_counter() - started
        for problem in problems:
            del self._groups[problem.id]
        groups = [[group.rollouts[j] for j in sorted(group.rollouts)] for group in current]
        partial = PartialRollouts(self._groups, self._pending_grades)
        return CollectedGroups(groups, grading_secs, partial)

    def _start(self, problem: Problem, step: int) -> Group:
        return Group.start(problem, self._guidance_of(problem), step)

    def _release(self, groups: Iterable[Group]) -> None:
        """Submits the new requests of groups to the engine, or to the grader if there is nothing to sample."""
        for group in groups:
            to_sample, complete = group.new_requests()
            self._engine.submit(to_sample, step=group.step, params=self._params)
            for request in complete:
                completion = Completion(request, (), (), FinishReason.NOT_SAMPLED)
                self._pending_grades[self._grade(completion)] = completion

    def _take_grades(self) -> None:
        """Observes finished grades and releases the requests that they allow, until no finished grades are left."""
        while done := [future for future in self._pending_grades if future.done()]:
            updated: dict[str, None] = {}  # An ordered set.
            for future in done:
                completion = self._pending_grades.pop(future)
                problem_id = completion.request.problem.id
                self._groups[problem_id].observe(completion, future.result())
                updated[problem_id] = None
            self._release(self._groups[problem_id] for problem_id in updated)

    def _fill_idle_slots(self, upcoming: collections.deque[Problem]) -> None:
        """Starts upcoming problems in idle slots, except for problems that are also part of this step."""
        while upcoming and self._engine.num_idle_slots > 0:
            problem = upcoming.popleft()
            if problem.id not in self._groups:
                group = self._groups[problem.id] = self._start(problem, self._step + 1)
                self._release([group])


def share_groups(
    local: Sequence[Sequence[Rollout]], problems: Sequence[Problem]
) -> list[list[Rollout]]:
    """Returns the groups of all `problems`, gathered from all processes, each of which collected a share."""
    if jax.process_count() == 1:
        return [list(group) for group in local]
    groups = gather_shares([[_to_json(rollout) for rollout in group] for group in local])
    return [
        [_from_json(record, problem) for record in group]
        for group, problem in zip(groups, problems, strict=True)
    ]


def _to_json(rollout: Rollout) -> list[Any]:
    request, completion = rollout.request, rollout.completion
    start = (request.sample_index, request.micro_group, request.expert_index, request.prefix_len)
    sampled = (completion.token_ids, completion.logprobs, completion.finish_reason)
    grade = (rollout.grade.reward, rollout.grade.judgments)
    return [*start, request.ratio, *sampled, *grade]


def _from_json(record: list[Any], problem: Problem) -> Rollout:
    *start, token_ids, logprobs, finish_reason, reward, judgments = record
    completion = Completion(
        RolloutRequest(problem, *start),
        tuple(token_ids),
        tuple(logprobs),
        FinishReason(finish_reason),
    )
    return Rollout(completion, Grade(reward, {n: Judgment(*j) for n, j in judgments.items()}))
