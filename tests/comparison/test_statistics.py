"""Checks confidence intervals and p-values over seeds and problems against exact results and by simulation."""

import numpy as np
import pytest
from scipy import stats

import simulate_comparisons
from trapo_jax.comparison.statistics import (
    LEVEL,
    STATISTICS,
    adjust,
    draw,
    interquartile_mean,
    point_estimate,
    weighted_mean,
    weighted_median,
)


def by_seed(*accuracies, num_problems=2_000):
    return np.repeat(np.array(accuracies, float)[:, None], num_problems, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_good", [0, 3, 8])
def test_the_interval_of_the_mean_is_the_clopper_pearson_interval_if_seeds_only_fail_or_succeed(
    num_good,
):
    scores = by_seed(*[1.0] * num_good, *[0.0] * (8 - num_good))
    expected = stats.binomtest(num_good, 8).proportion_ci(method="exact")
    assert draw(scores, weighted_mean).interval() == pytest.approx(tuple(expected), abs=0.01)


@pytest.mark.slow
def test_the_interval_of_the_mean_allows_for_a_failing_seed_that_was_not_run():
    low, high = draw(by_seed(*[0.8] * 10), weighted_mean).interval()
    assert low == pytest.approx(0.8 * 0.025**0.1, abs=0.01)  # if 31% of seeds fail with score 0
    assert high == pytest.approx(0.8 + 0.2 * (1 - 0.025**0.1), abs=0.01)


def test_the_interval_of_the_median_is_bounded_by_two_of_the_sorted_accuracies():
    accuracies = np.arange(10, 20) / 20
    # P(Binomial(10, 1/2) <= 1) = 0.011 < 0.025 < P(Binomial(10, 1/2) <= 2).
    interval = draw(by_seed(*accuracies), weighted_median).interval()
    assert interval == pytest.approx((accuracies[1], accuracies[-2]), abs=0.001)


def test_fewer_than_six_seeds_do_not_bound_the_median():
    assert draw(by_seed(*[0.5] * 5), weighted_median).interval() == pytest.approx((0, 1))
    low, high = draw(by_seed(*[0.5] * 6), weighted_median).interval()
    assert 0.49 < low < high < 0.51


@pytest.mark.parametrize("num_seeds", [1, 2, 4, 7, 10])
def test_point_estimates_equal_those_of_numpy_and_scipy(num_seeds):
    scores = np.random.default_rng(num_seeds).random((num_seeds, 50))
    means = scores.mean(axis=1)
    assert point_estimate(scores, weighted_mean) == pytest.approx(means.mean())
    assert point_estimate(scores, weighted_median) == pytest.approx(np.median(means))
    copies = np.repeat(means, 4)  # makes the number of scores divisible by 4
    expected = stats.trim_mean(copies, 0.25)
    assert point_estimate(scores, interquartile_mean) == pytest.approx(expected)


def test_noise_from_problems_that_both_methods_share_cancels_out():
    rng = np.random.default_rng(2)
    problems = rng.random((1, 200)) * 0.8
    a, b = (problems + shift + np.zeros((40, 1)) for shift in (0.05, 0.0))
    draws = [draw(x, weighted_median, stream=i) for i, x in enumerate((a, b), 1)]
    low, high = (draws[0] - draws[1]).interval()
    assert 0.02 < low < 0.05 < high < 0.08
    assert draws[0].interval()[0] < draws[1].interval()[1]


@pytest.mark.slow
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_p_value_is_below_a_level_if_and_only_if_the_interval_excludes_zero(statistic):
    rng = np.random.default_rng(1)
    outcomes = set()
    for gap in np.linspace(0, 0.6, 40):
        a, b = (by_seed(*rng.normal(x, 0.1, 12).clip(0, 1)) for x in (0.4 + gap, 0.4))
        draws = [draw(x, STATISTICS[statistic], stream=i) for i, x in enumerate((a, b), 1)]
        difference = draws[0] - draws[1]
        for level in (LEVEL, LEVEL / 15):
            low, high = difference.interval(level)
            is_significant = difference.p_value() < level
            assert is_significant == (low > 0 or high < 0)
            outcomes.add(is_significant)
    assert outcomes == {False, True}


def test_equal_methods_do_not_differ():
    draws = [draw(by_seed(*[0.5] * 10), weighted_mean, stream=i) for i in (1, 2)]
    assert (draws[0] - draws[1]).p_value() == 1


def test_p_values_are_adjusted_by_bonferroni_correction():
    assert adjust([0.2, 0.01, 0.02, 0.001]) == pytest.approx([0.8, 0.04, 0.08, 0.004])
    assert adjust([0.6, 0.9]) == [1.0, 1.0]
    assert adjust([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("num_seeds", [6, 10])
@pytest.mark.parametrize("case", simulate_comparisons.CASES, ids=lambda case: case.name)
def test_intervals_have_high_coverage_and_false_positives_are_rare(case, num_seeds, statistic):
    quality = simulate_comparisons.simulate(
        case, num_seeds=num_seeds, statistic=statistic, repeats=200
    )
    assert quality.coverage >= 0.93
    assert quality.false_positives <= 0.06
    assert quality.width < 1
