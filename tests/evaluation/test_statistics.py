"""Intervals, paired differences and corrected p-values: computed by hand, and compared with SciPy."""

import numpy as np
import pytest
from scipy import stats

from trapo_jax.evaluation.statistics import (
    bootknife_counts,
    bootstrap_interval,
    estimate,
    holm,
    standard_error,
)


def test_the_interval_contains_the_mean_and_narrows_with_more_problems():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 200
    low, high = bootstrap_interval(few)
    assert 0.25 <= low < 0.5 < high <= 0.75
    # The mean of n fair coins: +- 1.96 * 0.5 / sqrt(n).
    assert bootstrap_interval(many) == pytest.approx((0.451, 0.549), abs=0.01)
    assert bootstrap_interval(few) == (low, high)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_holm_equals_the_values_computed_by_hand():
    # Sorted: .001 .01 .02 .2, times 4, 3, 2, 1, and never below the adjusted value of a smaller one.
    assert holm([0.2, 0.01, 0.02, 0.001]) == pytest.approx([0.2, 0.03, 0.04, 0.004])
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_draw_leaves_one_item_out_and_all_items_are_equally_frequent():
    counts = bootknife_counts(np.random.default_rng(0), 4, 4_000)
    assert (counts.sum(axis=1) == 4).all()
    assert (counts.min(axis=1) == 0).all()
    assert counts.mean(axis=0) == pytest.approx([1, 1, 1, 1], abs=0.08)


def test_if_only_seeds_differ_the_estimate_is_the_t_test_over_seeds():
    of_seed = np.array([0.08, 0.15, 0.02, 0.11, 0.09])
    found = estimate(np.repeat(of_seed[:, None], 40, axis=1))
    assert found.mean == pytest.approx(0.09)
    expected = stats.ttest_1samp(of_seed, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1)
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=0.003)


def test_if_only_problems_differ_the_standard_error_is_that_of_a_mean_over_problems():
    of_problem = np.random.default_rng(1).normal(0.1, 0.5, 200)
    values = np.repeat(of_problem[None], 4, axis=0)
    assert standard_error(values) == pytest.approx(stats.sem(of_problem), rel=0.05)


def test_a_paired_difference_is_more_certain_than_the_difference_of_two_means():
    """Effects of problems and seeds that both methods share cancel."""
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.3, (1, 60))
    a, b = shared + 0.05, shared + rng.normal(0, 0.01, shared.shape)
    difference = estimate(a - b)
    assert difference.low > 0.03
    assert difference.p_value < 1e-4
    assert estimate(a).low < estimate(b).high


def test_a_noisy_difference_of_few_seeds_is_not_significant():
    """A plain percentile bootstrap would call it significant: four of five seeds are above zero."""
    of_seed = np.array([0.30, 0.25, 0.20, 0.15, -0.02])
    resampled = np.array([0.30, 0.25, 0.20, 0.15, -0.02])[
        np.random.default_rng(0).integers(5, size=(4_000, 5))
    ].mean(axis=1)
    assert np.percentile(resampled, 0.5) > 0
    found = estimate(np.repeat(of_seed[:, None], 50, axis=1))
    assert found.p_value > 0.01


def test_the_difference_of_equal_results_is_zero():
    assert estimate(np.zeros((3, 7))) == (0.0, 0.0, 0.0, 1.0)


def test_equal_values_have_p_value_one():
    assert estimate(np.full((3, 7), 0.25)) == (0.25, 0.25, 0.25, 1.0)


def test_few_problems_limit_the_degrees_of_freedom_as_few_seeds_do():
    values = np.random.default_rng(0).normal(0.3, 0.2, (9, 2))
    error = standard_error(values)
    expected = 2 * stats.t.sf(values.mean() / error, 1)
    assert estimate(values).p_value == pytest.approx(expected)


def test_with_one_seed_the_estimate_is_the_t_test_over_problems():
    of_problem = np.random.default_rng(1).normal(0.1, 0.5, 50)
    found = estimate(of_problem[None])
    expected = stats.ttest_1samp(of_problem, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1)


def test_false_positives_are_rare():
    """Seeds, problems and samples vary around a difference of zero."""
    rng = np.random.default_rng(3)
    p_values = [
        estimate(
            rng.normal(0, 0.08, (5, 1)) + rng.normal(0, 0.1, (1, 20)) + rng.normal(0, 0.2, (5, 20))
        ).p_value
        for _ in range(100)
    ]
    assert sum(p < 0.05 for p in p_values) <= 5
