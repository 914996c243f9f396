"""Statistics of studies: values computed by hand."""

import math

import numpy as np
import pytest

from rayrl.algorithms.study_statistics import (
    bootstrap_means,
    holm,
    interval,
    isotonic,
    labels_needed,
    mean_over_seeds,
    mean_ranks,
    paired_by_prompt,
    paired_test,
    t_test,
)


def test_mean_and_both_standard_errors_by_hand():
    found = mean_over_seeds([{"a": 1.0, "b": 3.0}, {"c": 4.0, "d": 8.0}])
    assert found.mean == 4  # of 2 and 6
    assert found.seed_error == pytest.approx(2.0)  # sqrt(8) / sqrt(2)
    # Contributions: -1/4, 1/4, -2/4, 2/4; sqrt((1/16 + 1/16 + 1/4 + 1/4) * 4/3).
    assert found.prompt_error == pytest.approx(math.sqrt(10 / 16 * 4 / 3))
    assert (found.num_seeds, found.num_prompts) == (2, 4)


def test_a_prompt_that_seeds_share_is_one_observation():
    shared = mean_over_seeds([{"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 3.0}])
    alone = mean_over_seeds([{"a": 1.0, "b": 3.0}])
    assert shared.prompt_error == pytest.approx(alone.prompt_error) == pytest.approx(1.0)
    assert alone.seed_error == math.inf


def test_prompts_are_paired_where_both_have_them():
    assert paired_by_prompt({"a": 3.0, "b": 1.0}, {"a": 1.0, "c": 9.0}) == {"a": 2.0}


def test_t_test_against_the_table():
    # t = 2.262 is the two-sided 5% point of 9 degrees of freedom, 12.706 that of one.
    assert t_test(2.262, 1.0, 10) == pytest.approx(0.05, abs=1e-4)
    assert t_test(-12.706, 1.0, 2) == pytest.approx(0.05, abs=1e-4)
    assert t_test(5.0, math.inf, 1) == 1.0
    assert (t_test(0.0, 0.0, 5), t_test(1.0, 0.0, 5)) == (1.0, 0.0)


def test_a_difference_has_to_hold_over_seeds_and_over_prompts():
    # The same in both seeds, but the two prompts contradict each other.
    assert paired_test(mean_over_seeds([{"a": 3.0, "b": -1.0}, {"a": 3.0, "b": -1.0}])) == pytest.approx(
        t_test(1.0, 2.0, 2)
    )


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.5 * 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_mean_ranks_with_ties():
    values = np.array([[3.0, 1.0, 1.0], [2.0, 5.0, 1.0], [np.nan, 1.0, 2.0]])
    assert mean_ranks(values) == pytest.approx([1.5, 1.75, 2.75])
    assert mean_ranks(values, is_loss=True) == pytest.approx([2.5, 2.25, 1.25])


def test_isotonic_regression_pools_violators():
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == pytest.approx([1.0, 2.5, 2.5, 4.0])
    assert isotonic([3.0, 2.0, 1.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_labels_needed_between_the_points_of_a_curve():
    labels, gains = [10, 20, 40], [0.2, 0.6, 1.0]
    assert labels_needed(labels, gains, 0.1) == pytest.approx(5)
    assert labels_needed(labels, gains, 0.4) == pytest.approx(15)
    assert labels_needed(labels, gains, 0.6) == pytest.approx(20)
    assert labels_needed(labels, gains, 0.8) == pytest.approx(30)
    assert labels_needed(labels, gains, 1.1) == math.inf
    # A dip is noise: 0.6 and 0.4 are one level of 0.5.
    assert labels_needed([10, 20, 30], [0.6, 0.4, 1.0], 0.75) == pytest.approx(25)


def test_bootstrap_of_equal_prompts_draws_seeds_only():
    seeds, prompts = [np.full((3, 2), 1.0), np.full((3, 2), 3.0)], [["a", "b", "c"], ["d", "e", "f"]]
    means = bootstrap_means(seeds, prompts, 400, seed=1)
    assert means.shape == (400, 2)
    widening = np.sqrt(2) * 12.7062 / 1.96  # of the t-distribution with one degree of freedom
    assert np.unique(np.round(means[:, 0], 3)) == pytest.approx([2 - widening, 2, 2 + widening], abs=1e-3)
    assert np.array_equal(means[:, 0], means[:, 1])  # points are drawn together
    assert abs(means.mean() - 2) < 0.1 * widening
    assert np.array_equal(means, bootstrap_means(seeds, prompts, 400, seed=1))


def test_bootstrap_of_prompts_that_seeds_share_or_have_alone():
    values, ids = np.arange(100.0)[:, None], [f"p{i}" for i in range(100)]
    error = values.std() / 10
    assert bootstrap_means([values], [ids], 2000).std() == pytest.approx(error, rel=0.1)
    # A second seed with the same prompts tells nothing new about prompts; one with others does.
    assert bootstrap_means([values, values], [ids, ids], 2000).std() == pytest.approx(error, rel=0.1)
    others = [f"q{i}" for i in range(100)]
    alone = bootstrap_means([values, values], [ids, others], 2000).std()
    # Weights are (1 +- k) / 2, or a half each, by turns: the mean of (1 + k^2) / 2 and 1 / 2, times error^2.
    widening = np.sqrt(2) * 12.7062 / 1.96
    assert alone == pytest.approx(error * np.sqrt((2 + widening**2) / 4), rel=0.1)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_of_few_seeds_hold(num_seeds):
    num_trials, num_held = 150, 0
    for trial in range(num_trials):
        rng = np.random.default_rng(trial)
        of_prompts = 0.07 * rng.standard_normal(100)
        drawn = [rng.choice(100, 30, replace=False) for _ in range(num_seeds)]
        seeds = [(of_prompts[rows] + 0.04 * rng.standard_normal())[:, None] for rows in drawn]
        prompts = [list(map(str, rows)) for rows in drawn]
        low, high = interval(bootstrap_means(seeds, prompts, 200)[:, 0])
        num_held += low <= 0 <= high
    assert num_held >= 0.93 * num_trials  # without the correction 78, 83 and 91%


def test_an_interval_may_end_at_infinity():
    assert interval(np.array([3.0, 1.0, np.inf, 2.0])) == (1.0, math.inf)
    assert interval(np.arange(101.0), 0.9) == (5.0, 95.0)
    assert all(map(math.isnan, interval(np.array([]))))


def test_what_is_not_defined_counts_against_both_ends():
    values = np.arange(100.0)
    values[[10, 90]] = np.nan
    assert interval(values, 0.94) == (0.0, 99.0)  # the third of 100 at either end, and two of them not defined
    values[50] = np.nan
    assert interval(values, 0.94) == (-math.inf, math.inf)
    assert interval(np.array([np.nan] * 3 + [2.0])) == (-math.inf, math.inf)
