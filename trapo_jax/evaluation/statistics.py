"""Computes confidence intervals for accuracies over problems, and pass@k."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def accuracy_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% confidence interval for an accuracy over a population of problems.

    This is the score interval of Wilson (1927) with an effective sample size, as for surveys (Korn and Graubard 1998):
    the variance s^2 between problems, which includes the noise of sampling few answers, is compared with the variance
    of a Bernoulli variable, p (1 - p). The ratio of these variances, shrunk toward 1 by one pseudo-problem, is the
    design effect, by which the number of problems is divided. The quantile of Student's t distribution replaces the
    normal quantile. The width of the interval is positive even if all answers are correct or all are wrong.
    `tools/simulate_intervals.py` measures the coverage of this interval.

    Args:
      values: the fraction of correct samples of each problem, in [0, 1].

    >>> low, high = accuracy_interval([1.0] * 30)
    >>> round(low, 2), high
    (0.88, 1.0)
    """
    from scipy.special import stdtrit  # Student's t distribution; takes half a second to import

    data = np.asarray(values, float)
    num, mean = len(data), float(data.mean())
    coin = mean * (1 - mean)
    ratio = min(1.0, float(data.var(ddof=1)) / coin) if num > 1 and coin > 0 else 1.0
    size = num * (num + 1) / (num * ratio + 1)
    square = float(stdtrit(max(num - 1, 1), 0.975)) ** 2
    center = (mean + square / (2 * size)) / (1 + square / size)
    half = math.sqrt(square * (coin / size + square / (4 * size**2))) / (1 + square / size)
    return max(0.0, center - half), min(1.0, center + half)


def interval_of_mean(
    means: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Returns the confidence interval of the mean of independent estimates, given the interval of each estimate.

    The distance from the mean to each limit is the root mean square of the estimates' distances to their own limits,
    divided by the square root of the number of estimates (Zou and Donner 2008, "MOVER"). The interval may be
    asymmetric.

    >>> low, high = interval_of_mean([0.5, 0.7], [(0.2, 0.8), (0.3, 0.8)])
    >>> round(low, 3), round(high, 3)
    (0.35, 0.758)
    """
    mean = fmean(means)
    below = math.hypot(*(m - low for m, (low, _) in zip(means, intervals, strict=True)))
    above = math.hypot(*(high - m for m, (_, high) in zip(means, intervals, strict=True)))
    return mean - below / len(means), mean + above / len(means)
