"""Analyzes the results of a comparison: scores, differences, and warnings about their validity."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trapo_jax.comparison.grid import Grid
from trapo_jax.comparison.results import Result
from trapo_jax.comparison.run_pool import Failure
from trapo_jax.comparison.statistics import (
    LEVEL,
    STATISTICS,
    adjust,
    draw,
    point_estimate,
)
from trapo_jax.comparison.tuning import TrialScore
from trapo_jax.types import UserError

BUDGET_TOLERANCE = 0.01
# With fewer seeds, the interval of the median always extends to the worst or the best possible score.
MIN_SEEDS = 6
MIN_SEEDS_IF_ONE_FAILS = 10
FAILURE_GAP = 0.2  # A seed has failed if its accuracy trails the best seed's by more than this.
MEAN, MEDIAN, IQM = STATISTICS  # The names of the statistics.
MEAN_OF_SOURCES = "mean of sources"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    Attributes:
      grid: the requested comparison.
      command: the command line that started the comparison.
      results: results of the completed final runs.
      failures: runs that failed, including tuning runs.
      trials: scores of all trials on the validation split; empty if nothing was tuned.
    """

    grid: Grid
    command: str
    results: Sequence[Result]
    failures: Sequence[Failure]
    trials: Sequence[TrialScore]

    def results_of(self, method: str) -> list[Result]:
        """Returns the results of a method, ordered by seed."""
        return [r for r in self.results if r.run.trial.method == method]

    @property
    def methods(self) -> list[str]:
        """The methods with at least one completed run."""
        return [method for method in self.grid.methods if self.results_of(method)]

    @property
    def num_samples(self) -> int:
        """Smallest number of samples per problem in an evaluation; 0 if no run is complete."""
        return self.results[0].num_samples if self.results else 0

    @property
    def sampling(self) -> str:
        """The number of samples and the temperature, such as `4 samples per problem at temperature 0.6`.

        The string is empty if no run is complete.
        """
        if not self.results:
            return ""
        scoring = self.results[0].run.config.evaluation
        counts = [f"{n} for {source}" for source, n in scoring.num_samples_by_source.items()]
        number = ", ".join([f"{scoring.num_samples} samples per problem", *counts])
        return f"{number} at temperature {scoring.temperature:g}"


class Estimate(NamedTuple):
    """An estimate and its interval."""

    value: float
    low: float
    high: float


class Contrast(NamedTuple):
    """A difference between two methods, with its simultaneous interval and adjusted p-value.

    With a probability of at least 95%, the intervals for all pairs of methods contain the true differences. The
    adjusted p-value is below `LEVEL` if and only if the interval excludes 0.
    """

    value: float
    low: float
    high: float
    adjusted_p: float


class Difference(NamedTuple):
    """The difference in sampled accuracy between two methods.

    Attributes:
      better, other: the methods; `better` has the higher mean.
      num_seeds: number of seeds of the method with fewer seeds.
      mean, median: differences between the means and between the medians over seeds.
    """

    better: str
    other: str
    num_seeds: int
    mean: Contrast
    median: Contrast

    def verdict(self, contrast: Contrast, margin: float) -> str:
        """Returns the name of the better method, "equivalent", "undecided", or a note that there is only one seed.

        Args:
          contrast: the difference between the means or between the medians.
          margin: largest absolute difference between equivalent methods.
        """
        if self.num_seeds < 2:
            return "one seed: no test"
        if max(abs(contrast.low), abs(contrast.high)) < margin:
            return "equivalent"
        if contrast.adjusted_p >= LEVEL:
            return "undecided"
        return self.better if contrast.value > 0 else self.other


class MethodScores(NamedTuple):
    """Scores of a method on the test split, and statistics of its training.

    Attributes:
      method, setting: the method and its tuned hyperparameters.
      by_seed: sampled accuracy, keyed by seed.
      num_failed: number of failed seeds; see `count_failed`.
      sampled, median, iqm: mean, median and interquartile mean of sampled accuracy over seeds.
      greedy, best_of: means of greedy accuracy and pass@n over seeds.
      entropy, completion_len, guidance, expert_share: means over seeds; see `Result`.
    """

    method: str
    setting: str
    by_seed: dict[int, float]
    num_failed: int
    sampled: Estimate
    median: Estimate
    iqm: Estimate
    greedy: Estimate
    best_of: Estimate
    entropy: float
    completion_len: float
    guidance: float
    expert_share: float


def score_methods(c: Comparison) -> list[MethodScores]:
    """Returns the scores of all methods, in descending order of their means."""
    rows = []
    for method in c.methods:
        results = c.results_of(method)
        scores = [r.after for r in results if r.after]
        sampled = np.stack([s.sampled for s in scores])
        by_seed = {r.run.seed: float(r.after.sampled.mean()) for r in results if r.after}
        rows.append(
            MethodScores(
                method,
                results[0].run.trial.setting,
                by_seed,
                num_failed=count_failed(by_seed.values()),
                sampled=estimate(sampled, MEAN),
                median=estimate(sampled, MEDIAN),
                iqm=estimate(sampled, IQM),
                greedy=estimate(np.stack([s.greedy for s in scores]), MEAN),
                best_of=estimate(np.stack([s.best_of for s in scores]), MEAN),
                entropy=float(np.mean([r.entropy for r in results])),
                completion_len=float(np.mean([s.completion_len for s in scores])),
                guidance=float(np.mean([r.guidance for r in results])),
                expert_share=float(np.mean([r.expert_share for r in results])),
            )
        )
    return sorted(rows, key=lambda row: -row.sampled.value)


def accuracy_by_source(results: Sequence[Result]) -> dict[str, float]:
    """Returns the mean sampled accuracy on each source's problems, and the unweighted mean of the sources.

    Args:
      results: complete runs of a method, which were scored on the same problems.

    Returns:
      The accuracy by source, in alphabetical order, and `MEAN_OF_SOURCES`; empty unless several sources are known.
    """
    scores = [r.after for r in results if r.after]
    sources = next((s.sources for s in scores if s.sources), ())
    by_problem = np.mean([s.sampled for s in scores], axis=0)
    accuracies = {
        source: float(np.mean(by_problem[np.array(sources) == source]))
        for source in sorted(set(sources))
    }
    if len(accuracies) < 2:
        return {}
    return {**accuracies, MEAN_OF_SOURCES: float(np.mean(list(accuracies.values())))}


def count_failed(accuracies: Collection[float]) -> int:
    """Returns the number of failed seeds: a seed has failed if its accuracy is far below the best seed's."""
    return sum(max(accuracies) - x > FAILURE_GAP for x in accuracies)


def estimate(scores: np.ndarray, statistic: str) -> Estimate:
    """Estimates a statistic over the seeds of `[seeds, problems]` scores, with its interval."""
    function = STATISTICS[statistic]
    return Estimate(point_estimate(scores, function), *draw(scores, function).interval())


def find_differences(c: Comparison) -> list[Difference]:
    """Estimates the difference in sampled accuracy on the same problems for all pairs of methods.

    Raises:
      UserError: if two methods were evaluated on different problems.
    """
    check_same_problems(c.results)
    scores = {
        method: np.stack([r.after.sampled for r in c.results_of(method) if r.after])
        for method in c.methods
    }
    pairs = [
        (a, b) if scores[a].mean() >= scores[b].mean() else (b, a)
        for a, b in itertools.combinations(scores, 2)
    ]
    means, medians = (find_contrasts(scores, pairs, name) for name in (MEAN, MEDIAN))
    return [
        Difference(a, b, min(len(scores[a]), len(scores[b])), mean, median)
        for (a, b), mean, median in zip(pairs, means, medians, strict=True)
    ]


def check_same_problems(results: Sequence[Result]) -> None:
    """Checks that all runs were evaluated on the same problems.

    Raises:
      UserError: if two runs were evaluated on different problems.
    """
    by_problems = {r.after.problems: str(r.run.record) for r in results if r.after}
    if len(by_problems) > 1:
        files = " and ".join(list(by_problems.values())[:2])
        raise UserError(
            f"{files}: scored on different problems; delete the records of the older comparison"
        )


def find_contrasts(
    scores: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], statistic: str
) -> list[Contrast]:
    """Estimates the differences between methods in a statistic over seeds.

    Args:
      scores: `[seeds, problems]` scores of each method.
      pairs: the pairs of methods to compare.
      statistic: name of the statistic.
    """
    function = STATISTICS[statistic]
    values = {method: point_estimate(x, function) for method, x in scores.items()}
    draws = {method: draw(x, function, stream=i) for i, (method, x) in enumerate(scores.items(), 1)}
    differences = [draws[a] - draws[b] for a, b in pairs]
    adjusted = adjust([difference.p_value() for difference in differences])
    return [
        Contrast(values[a] - values[b], *difference.interval(LEVEL / len(pairs)), p)
        for (a, b), difference, p in zip(pairs, differences, adjusted, strict=True)
    ]


def find_warnings(c: Comparison) -> list[str]:
    """Returns warnings about everything that limits the conclusions that can be drawn from the results."""
    warnings = []
    fewest = min([c.grid.num_seeds, *(len(c.results_of(method)) for method in c.methods)])
    failing = [row.method for row in score_methods(c) if row.num_failed]
    needed = MIN_SEEDS_IF_ONE_FAILS if failing else MIN_SEEDS
    if fewest < needed:
        seeds = "1 seed" if fewest == 1 else f"{fewest} seeds"
        why = f", because at least one run of {' and of '.join(failing)} failed" if failing else ""
        warnings.append(
            f"this is a smoke test, not a result: {seeds} per method, but at least {needed} are needed{why}"
        )
    for r in c.results:
        ratio = r.spent[c.grid.match] / c.grid.budget
        if abs(ratio - 1) > BUDGET_TOLERANCE:
            warnings.append(
                f"BUDGETS DO NOT MATCH: {r.run.name} spent {ratio:.1%} of {c.grid.budget:,.12g} "
                f"{c.grid.match}, a deviation of more than {BUDGET_TOLERANCE:.0%}"
            )
    warnings += [f"failed: {f.run.name}: {f.reason}" for f in c.failures]
    warnings += [f"no run of {m} is complete" for m in c.grid.methods if m not in c.methods]
    for a, b in itertools.combinations(c.trials, 2):
        if a.trial.method == b.trial.method and a.fingerprint == b.fingerprint and a.accuracies:
            warnings.append(
                f"{a.trial.method} gave identical results with {a.trial.setting} and with {b.trial.setting}: "
                "the swept field does not affect this method, so it was effectively tuned with fewer trials than the "
                "others"
            )
    return warnings
