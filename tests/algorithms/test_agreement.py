"""Agreement within a prompt: values computed by hand."""

import math

import numpy as np
import pytest

from rayrl.algorithms.agreement import MEASURES, by_prompt, pair_accuracy, rank_correlation, regret, without_length


def test_pairs_that_the_oracle_ties_do_not_count_and_ties_of_the_proxy_are_half():
    oracle = np.array([1.0, 2.0, 2.0, 4.0])
    # Ordered pairs: (1,2), (1,2), (1,4), (2,4), (2,4). The proxy ties the first, and orders the last one wrongly.
    predicted = np.array([1.0, 1.0, 5.0, 4.0])
    assert pair_accuracy(predicted, oracle) == pytest.approx((0.5 + 1 + 1 + 1 + 0) / 5)
    assert math.isnan(pair_accuracy(predicted, np.ones(4)))


def test_rank_correlation_of_three_places():
    # Ranks 1, 2, 3 against 1, 3, 2: 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5.
    assert rank_correlation(np.array([0.1, 0.5, 0.3]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)
    assert rank_correlation(np.zeros(3), np.array([1.0, 2.0, 3.0])) == 0
    assert math.isnan(rank_correlation(np.arange(3.0), np.ones(3)))


def test_regret_is_the_best_score_less_that_of_the_proxys_first():
    oracle = np.array([1.0, 5.0, 3.0])
    assert regret(np.array([0.0, 1.0, 0.5]), oracle) == 0
    assert regret(np.array([0.0, 0.1, 0.5]), oracle) == 2
    assert regret(np.zeros(3), oracle) == 2  # a proxy that knows nothing: the mean of all, 3


def test_a_proxy_that_is_length_alone_knows_nothing_without_it():
    lengths = np.array([10, 100, 1000, 50])
    assert (without_length(2 * np.log1p(lengths) + 1, lengths) == 0).all()  # no order is left, not even by rounding


def test_values_by_prompt_leave_abstentions_and_lone_responses_out():
    oracle = np.array([1.0, 2.0, 1.0, np.nan, 3.0, 1.0])
    prompts = np.array([7, 7, 8, 8, 9, 9])
    predicted = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert by_prompt(MEASURES["pair_accuracy"], predicted, oracle, prompts, np.ones(6)) == {7: 1.0, 9: 0.0}
    assert by_prompt(MEASURES["regret"], predicted, oracle, prompts, np.ones(6)) == {7: 0.0, 9: 2.0}
