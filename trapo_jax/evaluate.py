"""Accuracy of a policy on a set of problems: greedy, sampled, pass@k."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from statistics import fmean

from trapo_jax.sampling import RolloutEngine
from trapo_jax.types import (
    Completion,
    FinishReason,
    Problem,
    RolloutRequest,
    SamplingParams,
    Verdict,
)

# In place of a training step in the random keys: every evaluation of a run draws the same numbers,
# so that two of them differ by the policy alone.
EVALUATION_STEP = 2**32 - 1

Score = Callable[[Completion], Future[Verdict]]
Judged = tuple[Completion, Future[Verdict]]


def evaluate(
    engine: RolloutEngine,
    score: Score,
    problems: Sequence[Problem],
    *,
    num_samples: int,
) -> dict[str, float]:
    """Samples each problem once greedily and `num_samples` times at temperature 1, unguided.

    Args:
      engine: samples; must be idle, with the weights to evaluate.
      score: a completion's verdict, now or later.
      problems: distinct problems.
      num_samples: n, samples per problem.

    Returns:
      Metrics: `eval/accuracy_greedy`, `eval/accuracy_sampled` (both also for each source),
      `eval/pass@k` for k = 1, 2, 4 .. n, `eval/truncated` (share of all completions that reached the
      maximum length), `eval/completion_len_mean`, `eval/error_rate` and `eval/timeout_rate` (shares of
      all completions without a verdict).
    """
    greedy = _sample(engine, score, problems, num_samples=1, temperature=0.0)
    sampled = _sample(engine, score, problems, num_samples=num_samples, temperature=1.0)
    greedy_correct = {id_: _num_correct(judged) for id_, judged in greedy.items()}
    num_correct = {id_: _num_correct(judged) for id_, judged in sampled.items()}
    everything = [pair for group in (*greedy.values(), *sampled.values()) for pair in group]
    completions = [completion for completion, _ in everything]
    verdicts = [verdict.result() for _, verdict in everything]
    metrics = {
        "eval/accuracy_greedy": fmean(greedy_correct.values()),
        "eval/accuracy_sampled": fmean(num_correct.values()) / num_samples,
    }
    for k in _powers_of_2_up_to(num_samples):
        metrics[f"eval/pass@{k}"] = fmean(
            pass_at_k(num_samples, c, k) for c in num_correct.values()
        )
    for source in sorted({problem.source for problem in problems}):
        ids = [problem.id for problem in problems if problem.source == source]
        metrics[f"eval/accuracy_greedy/{source}"] = fmean(greedy_correct[i] for i in ids)
        metrics[f"eval/accuracy_sampled/{source}"] = (
            fmean(num_correct[i] for i in ids) / num_samples
        )
    metrics["eval/truncated"] = fmean(c.finish_reason is FinishReason.LENGTH for c in completions)
    metrics["eval/completion_len_mean"] = fmean(len(c.token_ids) for c in completions)
    metrics["eval/error_rate"] = fmean(v is Verdict.ERROR for v in verdicts)
    metrics["eval/timeout_rate"] = fmean(v is Verdict.TIMEOUT for v in verdicts)
    return metrics


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _sample(
    engine: RolloutEngine,
    score: Score,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    temperature: float,
) -> dict[str, list[Judged]]:
    requests = [RolloutRequest(p, j) for p in problems for j in range(num_samples)]
    engine.submit(requests, step=EVALUATION_STEP, params=SamplingParams(temperature))
    judged: dict[str, list[Judged]] = {problem.id: [] for problem in problems}
    while finished := engine.poll():
        for completion in finished:
            judged[completion.request.problem.id].append((completion, score(completion)))
    return judged


def _num_correct(judged: Sequence[Judged]) -> int:
    return sum(verdict.result() is Verdict.CORRECT for _, verdict in judged)


def _powers_of_2_up_to(number: int) -> list[int]:
    powers = [2**i for i in range(number.bit_length()) if 2**i <= number]
    return powers if powers[-1] == number else [*powers, number]
