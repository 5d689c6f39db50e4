"""Intervals, paired differences and corrected p-values, compared with hand-computed values and SciPy."""

import numpy as np
import pytest
from scipy import stats

import simulate_intervals
from trapo_jax.evaluation.statistics import (
    accuracy_interval,
    bootknife_counts,
    estimate,
    holm,
    standard_error,
)


def test_the_interval_of_single_samples_is_the_wilson_interval():
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
    assert 0.935 <= coverage <= 0.97  # 95% plus the error of 4,000 repeats


def test_holm_equals_the_values_computed_by_hand():
    # Sorted: .001 .01 .02 .2, times 4, 3, 2, 1, and never below the adjusted value of a smaller p-value.
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
    by_seed = np.array([0.08, 0.15, 0.02, 0.11, 0.09])
    found = estimate(np.repeat(by_seed[:, None], 40, axis=1))
    assert found.mean == pytest.approx(0.09)
    expected = stats.ttest_1samp(by_seed, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1)
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=0.003)


def test_if_only_problems_differ_the_standard_error_is_that_over_problems():
    by_problem = np.random.default_rng(1).normal(0.1, 0.5, 200)
    values = np.repeat(by_problem[None], 4, axis=0)
    assert standard_error(values) == pytest.approx(stats.sem(by_problem), rel=0.05)


def test_a_paired_difference_is_more_certain_than_the_difference_of_two_means():
    """Effects of problems and seeds that both methods share cancel out."""
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.3, (1, 60))
    a, b = shared + 0.05, shared + rng.normal(0, 0.01, shared.shape)
    difference = estimate(a - b)
    assert difference.low > 0.03
    assert difference.p_value < 1e-4
    assert estimate(a).low < estimate(b).high


def test_a_noisy_difference_of_few_seeds_is_not_significant():
    """A plain percentile bootstrap would consider it significant, because four of five seeds are above zero."""
    by_seed = np.array([0.30, 0.25, 0.20, 0.15, -0.02])
    resampled = np.array([0.30, 0.25, 0.20, 0.15, -0.02])[
        np.random.default_rng(0).integers(5, size=(4_000, 5))
    ].mean(axis=1)
    assert np.percentile(resampled, 0.5) > 0
    found = estimate(np.repeat(by_seed[:, None], 50, axis=1))
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
    by_problem = np.random.default_rng(1).normal(0.1, 0.5, 50)
    found = estimate(by_problem[None])
    expected = stats.ttest_1samp(by_problem, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1)


def test_false_positives_are_rare():
    """The true difference is zero, with random effects of seeds, problems and samples."""
    rng = np.random.default_rng(3)
    p_values = [
        estimate(
            rng.normal(0, 0.08, (5, 1)) + rng.normal(0, 0.1, (1, 20)) + rng.normal(0, 0.2, (5, 20))
        ).p_value
        for _ in range(100)
    ]
    assert sum(p < 0.05 for p in p_values) <= 5
