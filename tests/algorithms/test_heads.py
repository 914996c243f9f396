"""Heads whose spread is their error, on scores whose weights are known."""

import numpy as np
import pytest

from rayrl.algorithms.heads import Heads, fit_heads, fit_pair_heads, mean_and_spread

WIDTH = 24


def scores_of(num, *, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).standard_normal(WIDTH)
    vectors = rng.standard_normal((num, WIDTH)) / np.sqrt(WIDTH) + 3
    true = 3 + (vectors - 3) @ weights
    return vectors.astype(np.float32), true, true + noise * rng.standard_normal(num)


@pytest.mark.parametrize("num", [12, 60, 600])
def test_the_spread_of_the_heads_is_the_size_of_their_error(num):
    """Root mean square over draws: a spread of half or twice the error would send the questions elsewhere."""
    errors, spreads = [], []
    unseen, true, _ = scores_of(500, seed=1000)
    for seed in range(8):
        vectors, _, labels = scores_of(num, seed=seed)
        mean, spread = mean_and_spread(fit_heads(vectors, labels, np.arange(num), seed=seed).scores(unseen))
        errors.append(np.mean((mean - true) ** 2))
        spreads.append(np.mean(spread**2))
    assert 0.6 < np.sqrt(np.mean(spreads) / np.mean(errors)) < 1.6


def test_more_labels_teach_the_weights_and_the_noise():
    unseen, true, _ = scores_of(500, seed=1000)
    vectors, _, labels = scores_of(2000)
    heads = fit_heads(vectors, labels, np.arange(2000) // 4)
    assert np.corrcoef(mean_and_spread(heads.scores(unseen))[0], true)[0, 1] > 0.98
    assert heads.noise == pytest.approx(0.5, rel=0.1)


def test_labels_without_a_signal_give_nearly_equal_scores():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, WIDTH)).astype(np.float32)
    labels = 2 + rng.standard_normal(300)
    mean, _ = mean_and_spread(fit_heads(vectors, labels, np.arange(300)).scores(vectors))
    assert mean.std() < 0.3 * labels.std() and mean.mean() == pytest.approx(2, abs=0.2)


def test_one_head_is_the_ridge_regression_by_hand():
    """x = -1, 1 and y = 0, 2: centred by 0 and 1; w = 2 / (2 + ridge) about a prior of 0."""
    vectors, labels = np.array([[-1.0], [1.0]], np.float32), np.array([0.0, 2.0])
    heads = fit_heads(vectors, labels, np.arange(2), num_heads=2000, seed=0)
    # Half of the bootstrap samples hold both prompts once, the others one of them twice, which shows the same slope.
    slope = mean_and_spread(heads.weights)[0][0]
    assert slope == pytest.approx(2 / (2 + heads.ridge), abs=0.1)


def test_all_labels_of_a_prompt_are_drawn_together():
    """A head that has not drawn a prompt knows none of its labels, so that the heads stay further apart."""
    vectors, _, labels = scores_of(12)
    vectors, labels = np.repeat(vectors, 10, axis=0), np.repeat(labels, 10)
    unseen, _, _ = scores_of(200, seed=5)
    together, apart = (
        mean_and_spread(fit_heads(vectors, labels, groups, seed=3).scores(unseen))[1].mean()
        for groups in (np.repeat(np.arange(12), 10), np.arange(120))
    )
    assert apart < 0.8 * together


def test_comparisons_teach_the_order():
    vectors, true, _ = scores_of(800)
    differences, margins = vectors[:400] - vectors[400:], true[:400] - true[400:]
    won = np.random.default_rng(0).random(400) < 1 / (1 + np.exp(-4 * margins))
    heads = fit_pair_heads(differences, won, np.arange(400))
    unseen, expected, _ = scores_of(500, seed=1000)
    mean, spread = mean_and_spread(heads.scores(unseen))
    assert np.corrcoef(mean, expected)[0, 1] > 0.9 and (spread > 0).all()
    # The same comparisons the other way round are the same knowledge.
    turned = fit_pair_heads(-differences, ~won, np.arange(400))
    assert np.allclose(turned.weights, heads.weights)


def test_scores_are_one_product_with_a_bias_for_each_head():
    heads = Heads(weights=np.array([[1, 2]], np.float32), bias=np.array([0.5, -1]), noise=1.0, ridge=1.0)
    assert heads.scores(np.array([[3.0]])).tolist() == [[3.5, 5.0]]
    mean, spread = mean_and_spread(np.array([[1.0, 3.0]]))
    assert mean[0] == 2 and spread[0] == pytest.approx(np.sqrt(2))
