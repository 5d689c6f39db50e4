"""Computes confidence intervals and significance tests for methods trained with few seeds, some of which may fail.

The scores of a method form a matrix with one row per seed and one column per problem. Seeds are independent draws from
the distribution of the method's runs, problems are independent draws from the distribution of problems, and all scores
lie in [0, 1]. Nothing else is assumed. In particular, a method may fail with a rare seed that was not run; intervals
based on Student's t distribution or the bootstrap do not allow for this.

An interval is therefore computed by weighting the seeds and the problems at random, together with one extra seed and
one extra problem. For the lower end of the interval, the extra seed and problem have the worst possible scores; for the
upper end, they have the best possible scores. The weights of the n + 1 seeds follow the uniform distribution on the
simplex, as do the gaps between n sorted uniform random numbers. Notes on the statistics:

- Mean: if there is a single problem, this is the interval of Gaffke (2005); no counterexample to its coverage is known
  (Learned-Miller and Thomas 2019, arXiv 1905.06208). If, in addition, all scores are 0 or 1, it is the interval of
  Clopper and Pearson (1934). After n seeds that all succeed, it allows for a failure rate of up to
  1 - 0.025^(1 / n): 31% for n = 10.
- Median: this is the exact interval between two of the sorted scores. With fewer than 6 seeds, it extends to 0 or 1.
- Interquartile mean: the mean of the middle half of the seeds, a measure used by `rliable` (Agarwal et al. 2021).

Two methods are compared on the same problems, with independent seeds. `tools/simulate_comparisons.py` measures coverage
and the rate of false positives.

All functions are deterministic.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NUM_DRAWS = 20_000
LEVEL = 0.05  # Family-wise significance level.
ROUNDING = 1e-9  # Tolerance for rounding errors in cumulative weights.
PROBLEMS_STREAM = 0  # Random stream for the weights of problems; seeds use higher numbers.

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Draws(NamedTuple):
    """Random draws of a quantity, used to compute its intervals and tests.

    Attributes:
      low: float `[draws]`, computed with one extra seed and one extra problem that have the worst possible scores.
      high: the same with the best possible scores; elementwise at least `low`.
    """

    low: np.ndarray
    high: np.ndarray

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns an interval that misses the quantity with a probability of at most `level`."""
        # Trim as many draws as possible from each tail while guaranteeing that `p_value()` is below the level whenever
        # the interval excludes 0.
        num_outside = max(0, math.ceil(level / 2 * (len(self.low) + 1)) - 2)
        low, high = np.sort(self.low), np.sort(self.high)
        return float(low[num_outside]), float(high[-1 - num_outside])

    def p_value(self) -> float:
        """Returns the two-sided p-value of the hypothesis that the quantity is 0.

        It is the smallest level at which the interval excludes 0.
        """
        num_contrary = min(np.sum(self.low <= 0), np.sum(self.high >= 0))
        return min(1.0, 2 * float(num_contrary + 1) / (len(self.low) + 1))

    def __sub__(self, other: "Draws") -> "Draws":
        """Returns the draws of a difference."""
        return Draws(self.low - other.high, self.high - other.low)


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns means over the last axis, with weights that sum to 1."""
    return np.sum(scores * weights, axis=-1)


def weighted_median(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns weighted medians of scores that are sorted along the last axis.

    If two scores are in the middle, their mean is returned.
    """
    ends = np.cumsum(weights, axis=-1)
    first = np.argmax(ends >= 0.5 - ROUNDING, axis=-1)
    last = np.argmax(ends > 0.5 + ROUNDING, axis=-1)
    take = lambda i: np.take_along_axis(scores, i[..., None], axis=-1)[..., 0]
    return (take(first) + take(last)) / 2


def interquartile_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted means of the middle half of scores that are sorted along the last axis."""
    ends = np.clip(np.cumsum(weights, axis=-1), 0.25, 0.75)
    starts = np.concatenate([np.full_like(ends[..., :1], 0.25), ends[..., :-1]], axis=-1)
    return np.sum(scores * (ends - starts), axis=-1) * 2


STATISTICS: dict[str, Statistic] = {
    "mean": weighted_mean,
    "median": weighted_median,
    "iqm": interquartile_mean,
}


def point_estimate(scores: np.ndarray, statistic: Statistic) -> float:
    """Returns a statistic of the seeds' mean scores.

    Args:
      scores: float `[seeds, problems]` in [0, 1].
      statistic: one of `STATISTICS`.
    """
    means = np.sort(scores.mean(axis=1))
    return float(statistic(means, np.full(len(means), 1 / len(means))))


def draw(
    scores: np.ndarray, statistic: Statistic, *, stream: int = 1, num_draws: int = NUM_DRAWS
) -> Draws:
    """Draws random values of a statistic of the seeds' accuracies, for intervals and tests.

    Args:
      scores: float `[seeds, problems]` in [0, 1].
      statistic: one of `STATISTICS`.
      stream: number of the random stream for the weights of the seeds, at least 1. To compare two methods, use
        different streams; all methods share the weights of the problems, which pairs them by problem.
      num_draws: number of draws.
    """
    num_seeds, num_problems = scores.shape
    problems = _weights(num_problems + 1, num_draws, PROBLEMS_STREAM)
    seeds = _weights(num_seeds + 1, num_draws, stream)
    means = problems[:, 1:] @ scores.T  # [draws, seeds]
    order = np.argsort(means, axis=1)
    means = np.take_along_axis(means, order, axis=1)
    extra, weights = seeds[:, :1], np.take_along_axis(seeds[:, 1:], order, axis=1)
    low = statistic(
        np.concatenate([np.zeros_like(extra), means], axis=1),
        np.concatenate([extra, weights], axis=1),
    )
    high = statistic(
        np.concatenate([means + problems[:, :1], np.ones_like(extra)], axis=1),
        np.concatenate([weights, extra], axis=1),
    )
    return Draws(low, high)


@functools.lru_cache(maxsize=64)
def _weights(size: int, num_draws: int, stream: int) -> np.ndarray:
    """Returns `[draws, size]` weights that follow the uniform distribution on the simplex."""
    rng = np.random.default_rng((stream, size, num_draws))
    weights = rng.exponential(size=(num_draws, size))
    return weights / weights.sum(axis=1, keepdims=True)


def adjust(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for multiple testing (Bonferroni), so that the family-wise error rate is controlled.

    The adjusted p-value is below `LEVEL` if and only if the interval at `LEVEL / len(p_values)` excludes 0.

    >>> adjust([0.01, 0.04, 0.6])
    [0.03, 0.12, 1.0]
    """
    return [min(1.0, len(p_values) * p) for p in p_values]
