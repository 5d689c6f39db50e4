"""The loop in which every problem of a batch advances alone.

completions -> rewards -> scheduler -> new requests, until each group is whole. No problem waits for another,
and no micro-group for a straggler that cannot change its guidance; decoding goes on while verdicts are awaited.
The outcome does not depend on the order in which completions and verdicts arrive.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import jax

from trapo_jax.processes import gather_shares
from trapo_jax.sampling import RolloutEngine
from trapo_jax.scheduler import Scheduler
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


class Collected(NamedTuple):
    """What `collect_rollouts` brings.

    Attributes:
      groups: for each problem its G rollouts, by `sample_index`.
      reward_secs: seconds in which the loop judged, or had nothing to decode and waited for verdicts.
    """

    groups: list[list[Rollout]]
    reward_secs: float


def collect_rollouts(
    engine: RolloutEngine,
    scheduler_of: Callable[[Problem], Scheduler],
    score: Score,
    problems: Sequence[Problem],
    *,
    step: int,
    params: SamplingParams,
) -> Collected:
    """Samples a whole group for every problem, guided as its rewards ask for.

    Args:
      engine: samples; must be idle, with the weights to sample from.
      scheduler_of: what decides the guidance of a problem.
      score: a completion's verdict, now or later.
      problems: distinct problems.
      step: the optimiser step, part of the random keys.
      params: how tokens are drawn.
    """
    schedulers = {problem.id: scheduler_of(problem) for problem in problems}
    states = {problem.id: schedulers[problem.id].start(problem) for problem in problems}
    by_id = {problem.id: problem for problem in problems}
    if len(by_id) != len(problems):
        raise ValueError("a batch holds the same problem twice")
    submitted: dict[str, set[int]] = {problem.id: set() for problem in problems}
    rollouts: dict[str, dict[int, Rollout]] = {problem.id: {} for problem in problems}
    judging: dict[Future[Verdict], Completion] = {}
    reward_secs = 0.0

    def release(problem_ids: Iterable[str]) -> None:
        """Hands new requests to the engine, or to the verifier if nothing is left to sample."""
        for problem_id in problem_ids:
            scheduler = schedulers[problem_id]
            ready = scheduler.ready(by_id[problem_id], states[problem_id])
            new = [r for r in ready if r.sample_index not in submitted[problem_id]]
            submitted[problem_id].update(r.sample_index for r in new)
            complete = [r for r in new if is_complete(r, scheduler.max_completion_length)]
            to_sample = [r for r in new if r not in complete]
            engine.submit(to_sample, step=step, params=params)
            for request in complete:
                completion = Completion(request, (), (), FinishReason.NOT_SAMPLED)
                judging[score(completion)] = completion

    def take_verdicts() -> None:
        """Observes what has been judged and releases what that allows, until there is no more."""
        while done := [future for future in judging if future.done()]:
            touched: dict[str, None] = {}  # an ordered set
            for future in done:
                completion, verdict = judging.pop(future), future.result()
                id_, index = completion.request.problem.id, completion.request.sample_index
                rollouts[id_][index] = Rollout(completion, verdict, REWARDS[verdict])
                states[id_] = schedulers[id_].observe(states[id_], index, REWARDS[verdict])
                touched[id_] = None
            release(touched)

    release(states)
    take_verdicts()
    while (completions := engine.poll()) or judging:
        started = time.perf_counter()
        judging.update((score(completion), completion) for completion in completions)
        if not completions:
            wait(judging, return_when=FIRST_COMPLETED)
        take_verdicts()
        reward_secs += time.perf_counter() - started
    groups = [[rollouts[p.id][j] for j in sorted(rollouts[p.id])] for p in problems]
    return Collected(groups, reward_secs)


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
