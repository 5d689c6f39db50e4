"""Tests the confidence interval of an accuracy against SciPy and by simulation."""

import numpy as np
import pytest
from scipy import stats

import simulate_intervals
from trapo_jax.evaluation.statistics import accuracy_interval


def test_the_interval_with_one_sample_per_problem_is_the_wilson_interval():
    for num_correct in (0, 1, 150, 399, 400):
        values = [1.0] * num_correct + [0.0] * (400 - num_correct)
        expected = stats.binomtest(num_correct, 400).proportion_ci(method="wilson")
        assert accuracy_interval(values) == pytest.approx(tuple(expected), abs=5e-4)


def test_the_interval_has_a_positive_width_if_all_problems_agree():
    for value in (0.0, 0.5, 1.0):
        low, high = accuracy_interval([value] * 30)
        assert 0.0 <= low <= value <= high <= 1.0
        assert high - low > 0.05
    assert accuracy_interval([1.0])[0] < 0.5


def test_more_samples_or_more_problems_narrow_the_interval():
    rng = np.random.default_rng(0)
    width = lambda num_problems, k: np.diff(
        accuracy_interval(rng.binomial(k, 0.5, size=num_problems) / k)
    )
    assert width(100, 1) > width(100, 4) > width(100, 16)
    assert width(50, 4) > width(200, 4)


@pytest.mark.parametrize("num_samples", [1, 4, 32])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (1.0, 1.0), (0.2, 0.8)])
def test_the_interval_has_the_nominal_coverage(a, b, num_samples):
    coverage = simulate_intervals.coverage(
        a, b, num_problems=60, num_samples=num_samples, repeats=4000
    )
    assert 0.935 <= coverage <= 0.97  # 95%, with a margin for the sampling error of the repeats
