"""Intervals, paired differences and corrected significance, by hand and beside SciPy."""

import numpy as np
import pytest
from scipy import stats

from trapo_jax.evaluation.statistics import (
    bootknife_counts,
    bootstrap_interval,
    estimate,
    holm,
    standard_error,
    student_cdf,
    student_quantile,
)


def test_interval_holds_the_mean_and_narrows_with_more_problems():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 200
    low, high = bootstrap_interval(few)
    assert 0.25 <= low < 0.5 < high <= 0.75
    # 95 % of a mean of n fair coins: +- 1.96 * 0.5 / sqrt(n)
    assert bootstrap_interval(many) == pytest.approx((0.451, 0.549), abs=0.01)
    assert bootstrap_interval(few) == (low, high)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 255])
def test_student_s_distribution_is_scipy_s(degrees):
    for t in (-6.0, -2.1, -0.3, 0.0, 0.7, 4.0):
        assert student_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees))


def test_holm_by_hand():
    # Sorted .001 .01 .02 .2; times 4, 3, 2, 1; never below a smaller one's.
    assert holm([0.2, 0.01, 0.02, 0.001]) == pytest.approx([0.2, 0.03, 0.04, 0.004])
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_draw_leaves_one_out_and_all_come_up_equally():
    counts = bootknife_counts(np.random.default_rng(0), 4, 4_000)
    assert (counts.sum(axis=1) == 4).all()
    assert (counts.min(axis=1) == 0).all()
    assert counts.mean(axis=0) == pytest.approx([1, 1, 1, 1], abs=0.08)


def test_where_only_seeds_differ_it_is_the_t_test_over_seeds():
    of_seed = np.array([0.08, 0.15, 0.02, 0.11, 0.09])
    found = estimate(np.repeat(of_seed[:, None], 40, axis=1))
    assert found.mean == pytest.approx(0.09)
    theirs = stats.ttest_1samp(of_seed, 0.0)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=0.1)
    assert found[1:3] == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=0.003)


def test_where_only_problems_differ_it_is_the_error_of_a_mean_of_problems():
    of_problem = np.random.default_rng(1).normal(0.1, 0.5, 200)
    values = np.repeat(of_problem[None], 4, axis=0)
    assert standard_error(values) == pytest.approx(stats.sem(of_problem), rel=0.05)


def test_a_paired_difference_is_surer_than_the_difference_of_two_means():
    """Problems and seeds that are hard for both methods cancel."""
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.3, (1, 60))
    a, b = shared + 0.05, shared + rng.normal(0, 0.01, shared.shape)
    difference = estimate(a - b)
    assert difference.low > 0.03
    assert difference.p_value < 1e-4
    assert estimate(a).low < estimate(b).high


def test_few_seeds_are_not_enough_for_a_noisy_difference():
    """A plain percentile bootstrap would call this one significant: four of five seeds are above zero."""
    of_seed = np.array([0.30, 0.25, 0.20, 0.15, -0.02])
    resampled = np.array([0.30, 0.25, 0.20, 0.15, -0.02])[
        np.random.default_rng(0).integers(5, size=(4_000, 5))
    ].mean(axis=1)
    assert np.percentile(resampled, 0.5) > 0
    found = estimate(np.repeat(of_seed[:, None], 50, axis=1))
    assert found.p_value > 0.01


def test_equal_results_differ_by_nothing():
    assert estimate(np.zeros((3, 7))) == (0.0, 0.0, 0.0, 1.0)


def test_values_without_spread_are_no_evidence():
    assert estimate(np.full((3, 7), 0.25)) == (0.25, 0.25, 0.25, 1.0)


def test_few_problems_are_no_more_certain_than_few_seeds():
    values = np.random.default_rng(0).normal(0.3, 0.2, (9, 2))
    error = standard_error(values)
    expected = 2 * stats.t.sf(values.mean() / error, 1)
    assert estimate(values).p_value == pytest.approx(expected)


def test_one_seed_speaks_for_problems_alone():
    of_problem = np.random.default_rng(1).normal(0.1, 0.5, 50)
    found = estimate(of_problem[None])
    theirs = stats.ttest_1samp(of_problem, 0.0)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=0.1)


def test_methods_that_do_not_differ_are_seldom_said_to():
    """Seeds, problems and samples vary, around no difference."""
    rng = np.random.default_rng(3)
    p_values = [
        estimate(
            rng.normal(0, 0.08, (5, 1)) + rng.normal(0, 0.1, (1, 20)) + rng.normal(0, 0.2, (5, 20))
        ).p_value
        for _ in range(100)
    ]
    assert sum(p < 0.05 for p in p_values) <= 5
