"""Evaluates a policy on a set of problems: draws samples, grades them, and computes scores.

Evaluations during training and `python -m trapo_jax.evaluate` share this code.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

from trapo_jax.distributed.processes import gather, interrupt_together, my_share
from trapo_jax.evaluation.statistics import accuracy_interval, interval_of_mean, pass_at_k
from trapo_jax.types import (
    Completion,
    FinishReason,
    Grade,
    Problem,
    RolloutRequest,
    SamplingParams,
    Verdict,
)

# Identical samples with a log-probability below this value are almost certainly due to a shared random key.
MIN_COINCIDENCE_LOGPROB = -20.0
MAX_EXAMPLES = 16  # problems whose greedy responses are kept
NO_SOURCE = "no_source"  # source name for problems without a source

Sampler = Callable[[Sequence[RolloutRequest], SamplingParams], Iterator[tuple[Completion, Grade]]]


class Sample(NamedTuple):
    """A graded completion.

    Attributes:
      problem_id, source: the id and the source of the problem. Results are grouped by source.
      is_correct: whether the reward of the first reward function is 1.
      missing: the reason why the first reward function gave no reward; empty if it gave one.
      truncated: whether the completion reached the maximum length.
      completion_len: number of tokens of the completion.
      answer: the answer extracted from the response.
      logprob: log-probability of the whole completion under the distribution that it was sampled from.
      rewards: the reward of each reward function, keyed by the function's name; None for a missing reward.
      found_answer: whether the first reward function found an answer; None if it does not look for answers or failed.
    """

    problem_id: str
    source: str
    is_correct: bool
    missing: str
    truncated: bool
    completion_len: int
    answer: str | None = None
    logprob: float = 0.0
    rewards: Mapping[str, float | None] = MappingProxyType({})
    found_answer: bool | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a set of problems with n samples each. Rates are fractions of all samples.

    Attributes:
      num_problems, num_samples: number of problems, and the smallest number n of samples of any problem.
      accuracy: mean over problems of the fraction of samples that are correct; avg@n if each problem has n samples.
      interval: 95% confidence interval of the accuracy over problems; see `accuracy_interval`.
      pass_at_k: for k = 1 .. n, the unbiased estimate of the probability that one of k samples is correct.
      majority: fraction of problems whose most frequent answer is correct, also called maj@n; in a tie, the fraction
        of the tied answers that are correct. Answers are compared as strings; see `merge_equal_answers`.
      truncated: rate of completions that reached the maximum length.
      error_rate, timeout_rate: rates of samples whose reward is missing because of an error or a timeout. These
        samples count as wrong.
      completion_len_mean: mean number of tokens per completion.
      no_answer: among the samples judged by the first reward function, the fraction in which the function found no
        answer; None if the function does not look for answers.
    """

    num_problems: int
    num_samples: int
    accuracy: float
    interval: tuple[float, float]
    pass_at_k: tuple[float, ...]
    majority: float
    truncated: float
    error_rate: float
    timeout_rate: float
    completion_len_mean: float
    no_answer: float | None = None


def score_samples(samples: Sequence[Sample]) -> Scores:
    """Computes scores from samples.

    Raises:
      ValueError: if there are no samples.
    """
    if not samples:
        raise ValueError("no samples")
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem_id, []).append(sample)
    counts = [(len(group), sum(s.is_correct for s in group)) for group in groups.values()]
    shares = [correct / number for number, correct in counts]
    num_samples = min(number for number, _ in counts)
    return Scores(
        num_problems=len(groups),
        num_samples=num_samples,
        accuracy=fmean(shares),
        interval=accuracy_interval(shares),
        pass_at_k=tuple(
            fmean(pass_at_k(*count, k) for count in counts) for k in range(1, num_samples + 1)
        ),
        majority=fmean(map(_majority, groups.values())),
        truncated=fmean(s.truncated for s in samples),
        error_rate=_error_rate(samples),
        timeout_rate=_timeout_rate(samples),
        completion_len_mean=fmean(s.completion_len for s in samples),
        no_answer=_no_answer_rate(samples),
    )


def mean_of_sources(by_source: Mapping[str, Scores]) -> Scores:
    """Returns the unweighted mean of the scores of several sources, such as benchmarks of different sizes.

    The number of problems is the sum over sources, and the number of samples is the minimum.

    Args:
      by_source: the scores of at least one source, as from `scores_by_source`.
    """
    scores = list(by_source.values())
    num_samples = min(s.num_samples for s in scores)
    means = {
        field.name: fmean(getattr(s, field.name) for s in scores)
        for field in dataclasses.fields(Scores)
        if field.type is float
    }
    no_answer = [s.no_answer for s in scores if s.no_answer is not None]
    return Scores(
        num_problems=sum(s.num_problems for s in scores),
        num_samples=num_samples,
        interval=interval_of_mean([s.accuracy for s in scores], [s.interval for s in scores]),
        pass_at_k=tuple(fmean(s.pass_at_k[k] for s in scores) for k in range(num_samples)),
        no_answer=fmean(no_answer) if no_answer else None,
        **means,
    )


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: metrics over all problems, keyed by name.
      problems: columns with one entry per problem: `id`, `source`, `greedy` (1 if the greedy sample is correct),
        `correct` (number of correct samples, excluding the greedy one), `len` (mean number of tokens of these samples);
        and `examples`, records of the greedy responses to at most `MAX_EXAMPLES` problems of this process.
    """

    metrics: dict[str, float]
    problems: dict[str, list]


def evaluate(
    sample: Sampler,
    problems: Sequence[Problem],
    *,
    num_samples_of: Callable[[str], int],
    temperature: float,
    decode: Callable[[Sequence[int]], str],
) -> Evaluation:
    """Samples each problem without guidance: once greedily, and several times at `temperature`.

    Args:
      sample: a function that samples and grades requests with given sampling parameters; see `Actor.sampler`.
      problems: distinct problems.
      num_samples_of: a function that maps a source to the number of samples per problem.
      temperature: the sampling temperature of all but the greedy samples.
      decode: converts token ids to text.

    Returns:
      The results of each problem, and these metrics: `eval/accuracy_greedy` and `eval/accuracy_sampled`; if there are
      several sources, the accuracies for each source and their unweighted mean (`.../SOURCE` and
      `..._mean_of_sources`); `eval/pass@k` for k = 1, 2, 4, ... up to the smallest number of samples; `eval/entropy`,
      the mean of -log p over the tokens of the samples, which estimates the entropy at the temperature; over all
      completions, `eval/truncated`, `eval/completion_len_mean`, `eval/error_rate`, `eval/timeout_rate` and, if the
      first reward function looks for answers, `eval/no_answer`; if there are several reward functions, the mean reward
      of each (`eval/rewards/NAME`); and the settings `eval/temperature`, `eval/num_problems`, `eval/num_samples` (the
      smallest number) and, if the numbers differ, `eval/num_samples/SOURCE`.

    Raises:
      Interrupted: if `sample` raises `Interrupted` in any process.
    """

    share = my_share(problems)
    shown = {problem.id for problem in share[:MAX_EXAMPLES]}
    examples: list[dict[str, Any]] = []

    def keep(completion: Completion, grade: Grade, params: SamplingParams) -> Sample:
        problem = completion.request.problem
        if params.temperature == 0 and problem.id in shown:
            examples.append(
                {
                    "problem_id": problem.id,
                    "prompt": problem.prompt_text,
                    "completion": decode(completion.token_ids),
                    "gold": problem.answer,
                    **grade.as_record(),
                }
            )
        return make_sample(completion, grade)

    def sample_all(requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Sample]:
        """Samples the requests of this process and returns the samples of all processes."""
        mine = interrupt_together(
            lambda: [keep(*graded, params) for graded in sample(requests, params)]
        )
        return [Sample(*fields) for of_process in gather(mine) for fields in of_process]

    greedy = sample_all([RolloutRequest(p, 0) for p in share], SamplingParams(0.0))
    sampled = sample_all(
        [RolloutRequest(p, j) for p in share for j in range(num_samples_of(p.source))],
        SamplingParams(temperature),
    )
    overall = score_samples(sampled)
    ks = powers_of_2_up_to(overall.num_samples)
    metrics = {
        **_accuracies("greedy", greedy),
        **_accuracies("sampled", sampled),
        **{f"eval/pass@{k}": overall.pass_at_k[k - 1] for k in ks},
        "eval/entropy": -math.fsum(s.logprob for s in sampled)
        / max(1, sum(s.completion_len for s in sampled)),
        "eval/temperature": temperature,
        "eval/num_problems": overall.num_problems,
        **_sample_counts(sampled),
    }
    everything = greedy + sampled
    metrics["eval/truncated"] = fmean(s.truncated for s in everything)
    metrics["eval/completion_len_mean"] = fmean(s.completion_len for s in everything)
    metrics["eval/error_rate"] = _error_rate(everything)
    metrics["eval/timeout_rate"] = _timeout_rate(everything)
    if (no_answer := _no_answer_rate(everything)) is not None:
        metrics["eval/no_answer"] = no_answer
    metrics |= {f"eval/rewards/{name}": mean for name, mean in mean_rewards(sampled).items()}
    examples.sort(key=lambda example: example["problem_id"])
    return Evaluation(metrics, problem_columns(greedy, sampled) | {"examples": examples})


def _accuracies(kind: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the accuracy and, if there are several sources, that of each source and the mean over sources."""
    name = f"eval/accuracy_{kind}"
    accuracies = {name: score_samples(samples).accuracy}
    by_source = scores_by_source(samples)
    if len(by_source) > 1:
        accuracies |= {f"{name}/{source}": s.accuracy for source, s in by_source.items()}
        accuracies[f"{name}_mean_of_sources"] = mean_of_sources(by_source).accuracy
    return accuracies


def _sample_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """Returns the smallest number of samples per problem and, if the sources differ, the number for each source."""
    name = "eval/num_samples"
    by_source = {source: s.num_samples for source, s in scores_by_source(samples).items()}
    counts = {name: min(by_source.values())}
    if len({*by_source.values()}) > 1:
        counts |= {f"{name}/{source}": number for source, number in by_source.items()}
    return counts


def problem_columns(greedy: Sequence[Sample], sampled: Sequence[Sample]) -> dict[str, list]:
    """Returns the results of each problem, sorted by problem id; see `Evaluation.problems`.

    Args:
      greedy: one greedy sample per problem.
      sampled: samples of the same problems.
    """
    by_problem: dict[str, list[Sample]] = {}
    for sample in sampled:
        by_problem.setdefault(sample.problem_id, []).append(sample)
    greedy = sorted(greedy, key=lambda s: s.problem_id)
    groups = [by_problem[sample.problem_id] for sample in greedy]
    return {
        "id": [s.problem_id for s in greedy],
        "source": [s.source for s in greedy],
        "greedy": [int(s.is_correct) for s in greedy],
        "correct": [sum(s.is_correct for s in group) for group in groups],
        "len": [fmean(s.completion_len for s in group) for group in groups],
    }


def make_sample(completion: Completion, grade: Grade) -> Sample:
    """Extracts the data that the scores depend on from a graded completion."""
    problem = completion.request.problem
    first = next(iter(grade.judgments.values()))
    return Sample(
        problem_id=problem.id,
        source=problem.source,
        is_correct=grade.is_correct,
        missing=first.reason if first.reward is None else "",
        truncated=completion.finish_reason is FinishReason.LENGTH,
        completion_len=len(completion.token_ids),
        answer=grade.answer,
        logprob=sum(completion.logprobs),
        rewards={name: judgment.reward for name, judgment in grade.judgments.items()},
        found_answer=grade.found_answer,
    )


def mean_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the mean reward of each reward function, keyed by name; empty if there is only one function."""
    names = dict.fromkeys(name for sample in samples for name in sample.rewards)
    if len(names) < 2:
        return {}
    means = {}
    for name in names:
        rewards = [reward for sample in samples if (reward := sample.rewards.get(name)) is not None]
        means[name] = fmean(rewards) if rewards else 0.0
    return means


def merge_equal_answers(
    samples: Sequence[Sample], are_equal: Callable[[str, str], bool]
) -> list[Sample]:
    """Replaces each answer with the first equivalent answer to the same problem, for the majority vote.

    Args:
      samples: the samples. All correct answers to a problem are considered equivalent.
      are_equal: a function that returns whether two different strings are equivalent answers.
    """
    merged = []
    known: dict[tuple[str, bool], list[str]] = {}
    for sample in samples:
        answers = known.setdefault((sample.problem_id, sample.is_correct), [])
        answer = sample.answer
        if answer is not None:
            same = (a for a in answers if sample.is_correct or a == answer or are_equal(a, answer))
            answer = next(same, answer)
            if answer not in answers:
                answers.append(answer)
        merged.append(sample._replace(answer=answer))
    return merged


def _no_answer_rate(samples: Sequence[Sample]) -> float | None:
    found = [s.found_answer for s in samples if s.found_answer is not None]
    return fmean(not f for f in found) if found else None


def _error_rate(samples: Sequence[Sample]) -> float:
    return fmean(s.missing not in ("", Verdict.TIMEOUT) for s in samples)


def _timeout_rate(samples: Sequence[Sample]) -> float:
    return fmean(s.missing == Verdict.TIMEOUT for s in samples)


def scores_by_source(samples: Sequence[Sample]) -> dict[str, Scores]:
    """Returns the scores of each source's problems, keyed by source (`NO_SOURCE` for problems without a source)."""
    return {
        source or NO_SOURCE: score_samples([s for s in samples if s.source == source])
        for source in sorted({s.source for s in samples})
    }


def powers_of_2_up_to(number: int) -> list[int]:
    """Returns the powers of 2 up to `number`, and `number` itself.

    >>> powers_of_2_up_to(6)
    [1, 2, 4, 6]
    """
    powers = [2**i for i in range(number.bit_length())]
    return powers if powers[-1] == number else [*powers, number]


def shares_noise(completions: Sequence[tuple[tuple[int, ...], float]]) -> bool:
    """Returns whether a problem has identical samples that are very unlikely to be a coincidence.

    If so, these samples were probably drawn with the same random key.

    Args:
      completions: the token ids and the total log-probability of each sample.
    """
    seen = Counter(ids for ids, logprob in completions if logprob < MIN_COINCIDENCE_LOGPROB)
    return any(count > 1 for count in seen.values())


def _majority(group: Sequence[Sample]) -> float:
    votes = Counter(sample.answer for sample in group if sample.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = {sample.answer for sample in group if sample.is_correct}
    return fmean(answer in right for answer, count in votes.items() if count == most)
