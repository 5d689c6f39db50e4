"""Analysis of the results of a comparison: scores, significant differences, and warnings about their validity."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trapo_jax.comparison.grid import Grid
from trapo_jax.comparison.results import Result, Scores, TrialScore
from trapo_jax.comparison.run_pool import Failure
from trapo_jax.evaluation.statistics import LEVEL, Estimate, estimate, holm
from trapo_jax.types import UserError

BUDGET_TOLERANCE = 0.01
MIN_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    Attributes:
      grid: the requested comparison.
      command: the command line that started it.
      results: results of the complete final runs.
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
        """The methods with at least one complete run."""
        return [method for method in self.grid.methods if self.results_of(method)]

    @property
    def num_samples(self) -> int:
        """Number of samples per problem in an evaluation; 0 if no run is complete."""
        return self.results[0].num_samples if self.results else 0


class Difference(NamedTuple):
    """A paired difference between two methods.

    Attributes:
      better, other: the methods.
      num_seeds: number of seeds that both methods have in common.
      estimate: the mean difference, >= 0, with its interval and p-value.
      adjusted_p: the p-value, adjusted for the number of differences.
    """

    better: str
    other: str
    num_seeds: int
    estimate: Estimate
    adjusted_p: float = 1.0

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant. Never True with one seed, which says nothing about other seeds."""
        return self.num_seeds > 1 and self.adjusted_p < LEVEL


class MethodScores(NamedTuple):
    """Scores of a method on the test split, and statistics of its training."""

    method: str
    setting: str
    num_seeds: int
    sampled: Estimate
    greedy: Estimate
    best_of: Estimate
    entropy: float
    completion_len: float
    guidance: float
    expert_share: float


def score_methods(c: Comparison) -> list[MethodScores]:
    """Returns the scores of all methods, the best one first."""
    rows = []
    for method in c.methods:
        results = c.results_of(method)
        rows.append(
            MethodScores(
                method,
                results[0].run.trial.setting,
                len(results),
                *estimate_scores(list(scores_by_seed(results).values())),
                entropy=float(np.mean([r.entropy for r in results])),
                completion_len=float(np.mean([r.after.completion_len for r in results if r.after])),
                guidance=float(np.mean([r.guidance for r in results])),
                expert_share=float(np.mean([r.expert_share for r in results])),
            )
        )
    return sorted(rows, key=lambda row: -row.sampled.mean)


def estimate_scores(scores: Sequence[Scores]) -> list[Estimate]:
    """Estimates sampled accuracy, greedy accuracy and pass@n from one evaluation per seed."""
    estimates = []
    for name in ("sampled", "greedy", "best_of"):
        e = estimate(np.stack([getattr(s, name) for s in scores]))
        estimates.append(e._replace(low=max(0.0, e.low), high=min(1.0, e.high)))
    return estimates


def scores_by_seed(results: Sequence[Result]) -> dict[int, Scores]:
    """Returns the scores after training by seed."""
    return {r.run.seed: r.after for r in results if r.after}


def find_differences(c: Comparison) -> list[Difference]:
    """Estimates the difference in sampled accuracy for all pairs of methods, paired by seed and problem.

    Raises:
      UserError: if two methods were evaluated on different problems.
    """
    differences = []
    for a, b in itertools.combinations(c.methods, 2):
        scores_a, scores_b = scores_by_seed(c.results_of(a)), scores_by_seed(c.results_of(b))
        seeds = sorted(scores_a.keys() & scores_b.keys())
        if not seeds:
            continue
        if len({scores[s].ids for scores in (scores_a, scores_b) for s in seeds}) > 1:
            folders = " and ".join(str(c.results_of(m)[0].run.folder) for m in (a, b))
            raise UserError(
                f"{folders}: scored on different problems; delete the runs of the older comparison"
            )
        values = np.stack([scores_a[s].sampled - scores_b[s].sampled for s in seeds])
        if values.mean() < 0:
            a, b, values = b, a, -values
        differences.append(Difference(a, b, len(seeds), estimate(values)))
    adjusted = holm([difference.estimate.p_value for difference in differences])
    return [d._replace(adjusted_p=p) for d, p in zip(differences, adjusted, strict=True)]


def find_warnings(c: Comparison) -> list[str]:
    """Returns warnings about everything that limits the conclusions from the results."""
    warnings = []
    fewest = min([c.grid.num_seeds, *(len(c.results_of(method)) for method in c.methods)])
    if fewest < MIN_SEEDS:
        seeds = "1 seed" if fewest == 1 else f"{fewest} seeds"
        warnings.append(
            f"this is a smoke test, not a result: {seeds} per method instead of {MIN_SEEDS}"
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
                "the swept field does not affect it, so it was effectively tuned with fewer trials than the others"
            )
    return warnings
