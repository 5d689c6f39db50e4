"""What results of few seeds and many problems can tell: intervals, paired differences, corrected significance.

Pure NumPy; every function returns the same for the same values.

A method's results are a matrix, a row for each seed and a column for each problem. Both are drawn from more that could
have been: a bootstrap that resamples seeds and problems independently (Owen 2007, "The pigeonhole bootstrap") gives
the standard error, without the narrowness of a plain bootstrap of few seeds (each draw leaves one out: Hesterberg
2004, "bootknife"). Intervals and p-values are Student's, with as many degrees of freedom as seeds allow: five seeds do
not make a normal distribution. What neither seed nor problem explains (the sampling noise of a problem's few answers) the
bootstrap counts up to three times: intervals are rather too wide than too narrow. All methods share the draws, so that differences are paired.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2_000
NUM_PAIRED_RESAMPLES = 5_000
LEVEL = 0.05  # of the family of differences


class Estimate(NamedTuple):
    """A mean over seeds and problems, an interval of at least 95 %, and the p-value of its being zero."""

    mean: float
    low: float
    high: float
    p_value: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean, from resampled values; the same for the same values."""
    data = np.asarray(values)
    rng = np.random.default_rng(0)
    # Drawn by how often each distinct value comes up: there are few, k of n samples right.
    distinct, counts = np.unique(data, return_counts=True)
    drawn = rng.multinomial(len(data), counts / len(data), size=NUM_RESAMPLES)
    low, high = np.percentile(drawn @ distinct / len(data), [2.5, 97.5])
    return float(low), float(high)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of a result, or of a paired difference of two.

    Args:
      values: float `[seeds, problems]`; of a difference: one method's minus the other's, seed by seed and
        problem by problem.

    Returns:
      Mean, interval mean +- t * standard error and two-sided p-value. With one seed they cover the choice
      of problems alone, and say nothing about other seeds. Values that are all the same have no spread to judge
      them by: their p-value is 1.
    """
    values = np.asarray(values, float)
    num_seeds, num_problems = values.shape
    mean, error = float(values.mean()), standard_error(values)
    degrees = max(1, min((n for n in (num_seeds, num_problems) if n > 1), default=2) - 1)
    half = student_quantile(0.975, degrees) * error
    p_value = 2 * student_cdf(-abs(mean) / error, degrees) if error > 0 else 1.0
    return Estimate(mean, mean - half, mean + half, p_value)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `[seeds, problems]`, both resampled."""
    num_seeds, num_problems = values.shape
    rng = np.random.default_rng(0)
    seeds = bootknife_counts(rng, num_seeds, NUM_PAIRED_RESAMPLES)
    problems = bootknife_counts(rng, num_problems, NUM_PAIRED_RESAMPLES)
    means = np.sum((seeds @ values) * problems, axis=1) / (num_seeds * num_problems)
    spread = float(means.std(ddof=1))
    return spread if spread > 1e-12 else 0.0  # sums of equal values differ in the last digit


def bootknife_counts(rng: np.random.Generator, size: int, num_draws: int) -> np.ndarray:
    """How often each of `size` items comes up when one is left out and `size` are drawn from the rest.

    Returns:
      int `[num_draws, size]`; ones if there is but one item.
    """
    if size == 1:
        return np.ones((num_draws, 1), int)
    left_out = rng.integers(size, size=(num_draws, 1))
    drawn = rng.integers(size - 1, size=(num_draws, size))
    drawn += drawn >= left_out
    flat = (drawn + size * np.arange(num_draws)[:, None]).ravel()
    return np.bincount(flat, minlength=size * num_draws).reshape(num_draws, size)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): those below a level are significant at it together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def student_cdf(t: float, degrees: int) -> float:
    """Student's distribution function for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).

    >>> round(student_cdf(1.0, 1), 12)
    0.75
    """
    # Far out in the tail the formula is a difference of nearly equal numbers: right to 1e-15 absolutely.
    theta = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(theta) ** 2
    odd = degrees % 2 == 1
    term, total = 1.0, 0.0
    for j in range(degrees // 2):
        total += term
        term *= cos2 * ((2 * j + 2) / (2 * j + 3) if odd else (2 * j + 1) / (2 * j + 2))
    if odd:
        area = 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    else:
        area = math.sin(theta) * total
    return min(1.0, max(0.0, (1 + area) / 2))


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution has this probability in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if student_cdf(middle, degrees) > probability else (middle, high)
    return high
