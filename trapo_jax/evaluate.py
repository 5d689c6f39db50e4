"""Accuracy of a policy on a set of problems: greedy, sampled, pass@k."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from trapo_jax.sampling import RolloutEngine
from trapo_jax.types import Completion, FinishReason, Problem, RolloutRequest, SamplingParams

# In place of a training step in the random keys: every evaluation of a run draws the same numbers,
# so that two of them differ by the policy alone.
EVALUATION_STEP = 2**32 - 1

IsCorrect = Callable[[Completion], bool]


def evaluate(
    engine: RolloutEngine,
    is_correct: IsCorrect,
    problems: Sequence[Problem],
    *,
    num_samples: int,
) -> dict[str, float]:
    """Samples each problem once greedily and `num_samples` times at temperature 1, unguided.

    Args:
      engine: samples; must be idle, with the weights to evaluate.
      is_correct: judges a completion.
      problems: distinct problems.
      num_samples: n, samples per problem.

    Returns:
      Metrics: `eval/accuracy_greedy`, `eval/accuracy_sampled` (both also for each source),
      `eval/pass@k` for k = 1, 2, 4 .. n, `eval/truncated` (share of all completions that reached the
      maximum length) and `eval/completion_len_mean`.
    """
    greedy = _sample(engine, problems, num_samples=1, temperature=0.0)
    sampled = _sample(engine, problems, num_samples=num_samples, temperature=1.0)
    greedy_correct = {id_: is_correct(c[0]) for id_, c in greedy.items()}
    num_correct = {id_: sum(map(is_correct, c)) for id_, c in sampled.items()}
    completions = [c for group in (*greedy.values(), *sampled.values()) for c in group]
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
    return metrics


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _sample(
    engine: RolloutEngine, problems: Sequence[Problem], *, num_samples: int, temperature: float
) -> dict[str, list[Completion]]:
    requests = [RolloutRequest(p, j) for p in problems for j in range(num_samples)]
    engine.submit(requests, step=EVALUATION_STEP, params=SamplingParams(temperature))
    completions: dict[str, list[Completion]] = {problem.id: [] for problem in problems}
    while finished := engine.poll():
        for completion in finished:
            completions[completion.request.problem.id].append(completion)
    return completions


def _powers_of_2_up_to(number: int) -> list[int]:
    powers = [2**i for i in range(number.bit_length()) if 2**i <= number]
    return powers if powers[-1] == number else [*powers, number]
