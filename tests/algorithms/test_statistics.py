import math

import numpy as np
import pytest
from nltk.translate.bleu_score import sentence_bleu
from scipy.stats import spearmanr

from rayrl.algorithms.estimate import CalibrationBin
from rayrl.algorithms.statistics import (
    accuracy_within,
    best_of_n_kl,
    calibration_table,
    distinct_n,
    expected_calibration_error,
    kl_estimate,
    length_controlled_win_rate,
    order_agreement,
    paired_difference,
    perplexity,
    self_bleu,
    spearman,
    win_rate,
)

RNG_SEEDS = range(200)


def test_paired_difference():
    estimate = paired_difference(np.array([3, 4, 5]), np.array([1, 1, 1]))
    assert (estimate.mean, estimate.num) == (3.0, 3)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert paired_difference(np.array([3]), np.array([1])).standard_error == math.inf
    with pytest.raises(ValueError, match="got none"):
        paired_difference(np.array([]), np.array([]))


def test_standard_errors_are_the_spread_over_repetitions():
    def repeat(estimate_of):
        estimates = [estimate_of(np.random.default_rng(seed)) for seed in RNG_SEEDS]
        return np.std([e.mean for e in estimates]) / np.mean([e.standard_error for e in estimates])

    def rank(rng):
        x = rng.standard_normal(60)
        return spearman(x, x + rng.standard_normal(60))

    def controlled(rng):
        longer = rng.normal(0, 50, 150)
        wins = rng.random(150) < 1 / (1 + np.exp(-0.4 - 1.5 * np.tanh(longer / 50)))
        return length_controlled_win_rate(wins, longer + 300, np.full(150, 300))

    assert repeat(rank) == pytest.approx(1, abs=0.2)
    assert repeat(controlled) == pytest.approx(1, abs=0.2)


def test_win_rate_counts_a_tie_as_half():
    assert win_rate(np.array([2, 1, 0, 5]), np.array([1, 1, 1, 1])).mean == 0.625
    assert win_rate(np.array([1.0]), np.array([1.0])).mean == 0.5


def test_length_control_finds_the_win_rate_at_equal_length():
    rng = np.random.default_rng(0)
    longer = rng.normal(40, 50, 20000)
    at_equal_length = 1 / (1 + math.exp(0.5))
    wins = rng.random(20000) < 1 / (1 + np.exp(0.5 - 2 * np.tanh(longer / longer.std())))
    estimate = length_controlled_win_rate(wins, longer + 300, np.full(20000, 300))
    assert estimate.mean == pytest.approx(at_equal_length, abs=3 * estimate.standard_error)
    assert wins.mean() > at_equal_length + 10 * estimate.standard_error


def test_length_control_without_a_length_difference_is_the_win_rate():
    wins = np.array([1, 0, 0.5, 1, 1, 0, 1, 1.0])
    estimate = length_controlled_win_rate(wins, np.full(8, 10), np.full(8, 10))
    assert estimate.mean == pytest.approx(wins.mean(), abs=1e-3)
    assert estimate.standard_error == pytest.approx(win_rate(2 * wins, np.ones(8)).standard_error, rel=0.1)


def test_length_control_survives_winning_everything():
    estimate = length_controlled_win_rate(np.ones(50), np.arange(50), np.arange(50)[::-1])
    assert 0.98 < estimate.mean <= 1
    assert 0 <= estimate.standard_error < 0.01


def test_spearman():
    x, y = np.array([1, 2, 2, 3, 7, 5]), np.array([1, 1, 4, 3, 9, 2])
    assert spearman(x, y).mean == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, -x).mean == pytest.approx(-1)
    assert spearman(x, np.ones(6)) is None
    assert spearman(x[:3], y[:3]) is None


def test_accuracy_and_calibration():
    predicted, oracle = np.array([0.0, 1.0, 3.9, 4.0]), np.array([1, 3, 4, 4])
    assert accuracy_within(predicted, oracle) == 0.75
    table = calibration_table(predicted, oracle, num_bins=4)
    assert [row.num for row in table] == [1, 1, 2]
    mean_predicted = pytest.approx(3.95)
    assert table[-1] == CalibrationBin(low=3.0, high=4.0, num=2, mean_predicted=mean_predicted, mean_oracle=4.0)
    assert sum(row.num for row in calibration_table(np.ones(3), np.ones(3), num_bins=5)) == 3


def test_kl_and_perplexity():
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 1.0, 20000)
    estimate = kl_estimate(-0.5 * (samples - 1) ** 2, -0.5 * samples**2)
    assert estimate.mean == pytest.approx(0.5, abs=3 * estimate.standard_error)
    assert perplexity(np.log([0.25, 0.0625]), np.array([1, 2])) == pytest.approx(4)
    assert perplexity(np.array([-1e6]), np.array([1])) == math.inf


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"]) == 0.5
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["one", ""]) == 0.0


def test_self_bleu_is_nltks_where_every_order_matches():
    texts = [
        "once upon a time there was a little dog",
        "once upon a time there was a big red dog",
        "there was a little cat who saw a big red dog and once upon a time",
        "once upon a time there was a little dog and a cat",
    ]
    words = [text.split() for text in texts]
    expected = [sentence_bleu(words[:i] + words[i + 1 :], words[i]) for i in range(4)]
    assert self_bleu(texts) == pytest.approx(np.mean(expected))


def test_self_bleu_orders_by_diversity():
    alike = ["the cat sat on the mat"] * 5
    different = [" ".join(f"w{5 * i + j}" for j in range(6)) for i in range(5)]
    assert self_bleu(alike) == pytest.approx(1)
    assert self_bleu(different) < 0.2 < self_bleu(alike[:2] + different)
    assert self_bleu(["alone"]) == 0.0
    assert self_bleu(["", "a b"]) >= 0.0


def test_self_bleu_samples_deterministically():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 12)) for _ in range(60)]
    assert self_bleu(texts, num_sampled=20) == self_bleu(texts, num_sampled=20)
    assert self_bleu(texts, num_sampled=20) != self_bleu(texts, num_sampled=20, seed=1)


def test_expected_calibration_error_by_hand():
    confidences = np.array([0.55, 0.58, 0.9, 0.95, 0.99, 1.0])
    correct = np.array([1, 0, 1, 1, 0, 1])
    low = abs(0.55 + 0.58 - 1)  # bin [0.5, 0.6)
    high = abs(0.9 + 0.95 + 0.99 + 1.0 - 3)  # bin [0.9, 1]
    assert expected_calibration_error(confidences, correct) == pytest.approx((low + high) / 6)
    assert expected_calibration_error(confidences, correct, num_bins=1) == pytest.approx(abs(4.97 - 4) / 6)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([0.5, 0.5])) == 0.5
    with pytest.raises(ValueError, match="got none"):
        expected_calibration_error(np.array([]), np.array([]))


def test_the_order_of_pairs_ties_and_abstentions():
    oracle = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [np.nan, 1.0], [0.0, 5.0]])
    predicted = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 3.0]])
    found = order_agreement(oracle, predicted)
    assert (found.mean, found.num) == (0.5, 3)  # right, wrong, a tie of the prediction
    assert order_agreement(oracle[2:4], predicted[2:4]) is None


def test_the_best_of_one_is_the_policy_itself():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(np.log(4) - 0.75)
