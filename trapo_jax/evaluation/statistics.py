"""Confidence intervals, paired differences and corrected p-values for results with few seeds and many problems.

The results of a method form a matrix with one row per seed and one column per problem; both are samples from a larger
population. A bootstrap that resamples seeds and problems independently (Owen 2007, "The pigeonhole bootstrap")
estimates the standard error. Each draw leaves one item out (Hesterberg 2004, "bootknife"), because the intervals of a
plain bootstrap are too narrow with few seeds. Intervals and p-values use Student's t distribution with as many degrees
of freedom as the seeds allow. Noise that neither the seed nor the problem explains, such as that of sampling few
answers to a problem, is counted up to three times, so that intervals err on the side of being too wide. All methods
share the draws, so that differences are paired.

All functions are deterministic.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_PAIRED_RESAMPLES = 5_000
LEVEL = 0.05  # family-wise significance level


class Estimate(NamedTuple):
    """A mean over seeds and problems, its 95% confidence interval, and the p-value of the hypothesis that it is 0."""

    mean: float
    low: float
    high: float
    p_value: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def accuracy_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% confidence interval of an accuracy over a population of problems.

    This is the score interval of Wilson (1927) with an effective sample size, as for surveys (Korn and Graubard 1998):
    the variance s^2 between problems, which includes the noise of sampling few answers, is compared with the variance
    of a Bernoulli variable, p (1 - p). Their ratio, shrunk toward 1 by one pseudo-problem, is the design effect, by
    which the number of problems is divided. The normal quantile is replaced with that of Student's t distribution. The
    width of the interval is positive even if all answers are correct or all are wrong. `tools/simulate_intervals.py`
    measures its coverage.

    Args:
      values: the fraction of correct samples of each problem, in [0, 1].

    >>> low, high = accuracy_interval([1.0] * 30)
    >>> round(low, 2), high
    (0.88, 1.0)
    """
    data = np.asarray(values, float)
    num, mean = len(data), float(data.mean())
    coin = mean * (1 - mean)
    ratio = min(1.0, float(data.var(ddof=1)) / coin) if num > 1 and coin > 0 else 1.0
    size = num * (num + 1) / (num * ratio + 1)
    square = _t_quantile(0.975, max(num - 1, 1)) ** 2
    center = (mean + square / (2 * size)) / (1 + square / size)
    half = math.sqrt(square * (coin / size + square / (4 * size**2))) / (1 + square / size)
    return max(0.0, center - half), min(1.0, center + half)


def estimate(values: np.ndarray) -> Estimate:
    """Estimates the mean of a result, or of the paired difference of two results.

    Args:
      values: float `[seeds, problems]`. For a difference, the values of one method minus those of the other, seed by
        seed and problem by problem.

    Returns:
      The mean, the interval mean +- t * standard error, and the two-sided p-value. With one seed, they reflect only
      the choice of problems. If all values are equal, the standard error is 0 and the p-value is defined as 1.
    """
    values = np.asarray(values, float)
    num_seeds, num_problems = values.shape
    mean, error = float(values.mean()), standard_error(values)
    degrees = max(1, min((n for n in (num_seeds, num_problems) if n > 1), default=2) - 1)
    half = _t_quantile(0.975, degrees) * error
    p_value = 2 * _t_probability(-abs(mean) / error, degrees) if error > 0 else 1.0
    return Estimate(mean, mean - half, mean + half, p_value)


def _t_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's t distribution."""
    from scipy.special import stdtrit  # takes half a second to import

    return float(stdtrit(degrees, probability))


def _t_probability(value: float, degrees: int) -> float:
    """Returns the probability of a value that is at most this large in Student's t distribution."""
    from scipy.special import stdtr

    return float(stdtr(degrees, value))


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of a `[seeds, problems]` array, resampling both axes."""
    num_seeds, num_problems = values.shape
    rng = np.random.default_rng(0)
    seeds = bootknife_counts(rng, num_seeds, NUM_PAIRED_RESAMPLES)
    problems = bootknife_counts(rng, num_problems, NUM_PAIRED_RESAMPLES)
    means = np.sum((seeds @ values) * problems, axis=1) / (num_seeds * num_problems)
    spread = float(means.std(ddof=1))
    return spread if spread > 1e-12 else 0.0  # Sums of equal values may differ by rounding errors.


def bootknife_counts(rng: np.random.Generator, size: int, num_draws: int) -> np.ndarray:
    """Draws counts of `size` items in bootknife samples: one item is left out, and `size` are drawn from the others.

    Returns:
      int `[num_draws, size]`; ones if there is only one item.
    """
    if size == 1:
        return np.ones((num_draws, 1), int)
    left_out = rng.integers(size, size=(num_draws, 1))
    drawn = rng.integers(size - 1, size=(num_draws, size))
    drawn += drawn >= left_out
    flat = (drawn + size * np.arange(num_draws)[:, None]).ravel()
    return np.bincount(flat, minlength=size * num_draws).reshape(num_draws, size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for multiple testing (Holm 1979): those below a level are jointly significant at that level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
