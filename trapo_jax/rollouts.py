"""The loop in which every problem of a batch advances alone.

completions -> rewards -> scheduler -> new requests, until each group is whole. No problem waits for another,
and no micro-group for a straggler that cannot change its guidance.
"""

from collections.abc import Callable, Sequence

from trapo_jax.sampling import RolloutEngine
from trapo_jax.scheduler import Scheduler
from trapo_jax.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Verdict,
)

Score = Callable[[Completion], tuple[Verdict, float]]


def collect_rollouts(
    engine: RolloutEngine,
    scheduler: Scheduler,
    score: Score,
    problems: Sequence[Problem],
    *,
    step: int,
    params: SamplingParams,
) -> list[list[Rollout]]:
    """Samples a whole group for every problem, guided as its rewards ask for.

    Args:
      engine: samples; must be idle, with the weights to sample from.
      scheduler: decides guidance.
      score: a completion's verdict and reward.
      problems: distinct problems.
      step: the optimiser step, part of the random keys.
      params: how tokens are drawn.

    Returns:
      For each problem its G rollouts, by `sample_index`.
    """
    states = {problem.id: scheduler.start(problem) for problem in problems}
    by_id = {problem.id: problem for problem in problems}
    if len(by_id) != len(problems):
        raise ValueError("a batch holds the same problem twice")
    submitted: dict[str, set[int]] = {problem.id: set() for problem in problems}
    rollouts: dict[str, dict[int, Rollout]] = {problem.id: {} for problem in problems}

    def finish(completion: Completion) -> None:
        problem_id, index = completion.request.problem.id, completion.request.sample_index
        verdict, reward = score(completion)
        rollouts[problem_id][index] = Rollout(completion, verdict, reward)
        states[problem_id] = scheduler.observe(states[problem_id], index, reward)

    def release(problem_id: str) -> list[RolloutRequest]:
        """New requests of the problem; rollouts with nothing to sample are finished on the way."""
        to_sample: list[RolloutRequest] = []
        pending = True
        while pending:
            ready = scheduler.ready(by_id[problem_id], states[problem_id])
            new = [r for r in ready if r.sample_index not in submitted[problem_id]]
            submitted[problem_id].update(r.sample_index for r in new)
            complete = [r for r in new if is_complete(r, scheduler.max_completion_length)]
            to_sample += [r for r in new if r not in complete]
            for request in complete:
                finish(Completion(request, (), (), FinishReason.NOT_SAMPLED))
            pending = bool(complete)  # their rewards may have released more
        return to_sample

    engine.submit([r for p in problems for r in release(p.id)], step=step, params=params)
    while completions := engine.poll():
        for completion in completions:
            finish(completion)
        touched = dict.fromkeys(c.request.problem.id for c in completions)
        engine.submit([r for id_ in touched for r in release(id_)], step=step, params=params)
    return [[rollouts[p.id][j] for j in range(scheduler.group_size)] for p in problems]


def is_complete(request: RolloutRequest, max_completion_length: int) -> bool:
    """Whether the expert prefix is the whole response: nothing is left to sample."""
    if request.prefix_len == 0:
        return False
    whole = request.prefix_len == len(request.problem.experts[request.expert_index].token_ids)
    return whole or request.prefix_len >= max_completion_length
