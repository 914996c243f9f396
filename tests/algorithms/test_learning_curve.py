"""Learning curves of paid labels: counted by hand, and with errors that are right on data of known noise."""

import numpy as np
import pytest

from rayrl.algorithms.learning_curve import (
    MAX_HELD_OUT_LABELS,
    MIN_LABELS,
    MIN_PROMPTS,
    accuracy,
    concordance,
    learning_curve,
)


def labelled(num_prompts: int, per_prompt: int = 2, *, width: int = 12, seed: int = 0, signal: float = 1.0):
    """Scores that are linear in the vectors, with noise of the prompt and of the response."""
    rng = np.random.default_rng(seed)
    weights = np.full(width, signal / np.sqrt(width))
    groups = np.repeat(np.arange(num_prompts), per_prompt)
    vectors = rng.standard_normal((len(groups), width)).astype(np.float32)
    noise = rng.standard_normal(len(groups)) + 0.5 * rng.standard_normal(num_prompts)[groups]
    return vectors, vectors @ weights + noise, groups


def test_concordance_counted_by_hand():
    predicted, scores = np.array([1.0, 2.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0, 3.0])
    groups = np.array([7, 7, 9, 9])
    counts = concordance(predicted, scores, groups)
    # Pairs (0, 1), (0, 2): right. (0, 3), (1, 3): wrong. (1, 2): a tie of the fit. (2, 3): a tie of the oracle.
    assert (counts.agreed, counts.ordered) == (2.5, 5)
    # All pairs touch the first prompt, and all but (0, 1) the second.
    assert counts.agreed_of_prompt.tolist() == [2.5, 1.5]
    assert counts.ordered_of_prompt.tolist() == [5, 4]


def test_accuracy_counted_by_hand():
    counts = accuracy(np.array([1.0, -1.0, 0.0]), np.array([True, True, False]), np.array([3, 3, 5]))
    assert (counts.agreed, counts.ordered) == (1.5, 3)
    assert counts.agreed_of_prompt.tolist() == [1, 0.5] and counts.ordered_of_prompt.tolist() == [2, 1]


def test_the_influence_of_a_prompt_is_that_of_leaving_it_out():
    vectors, scores, groups = labelled(8)
    predicted = vectors[:, 0] + vectors[:, 1]
    counts = concordance(predicted, scores, groups)
    without = []
    for prompt in range(8):
        rest = groups != prompt
        left = concordance(predicted[rest], scores[rest], groups[rest])
        without.append(left.agreed / left.ordered)
    changes = counts.agreed / counts.ordered - np.array(without)
    assert counts.influence == pytest.approx(7 * (changes - changes.mean()))


def test_agreement_rises_with_labels_to_what_is_there():
    curve = learning_curve(*labelled(120))
    assert curve is not None
    assert curve.sizes[-1] == 180 and (np.diff(curve.sizes) > 0).all()
    assert curve.agreement.shape == (16, len(curve.sizes))
    assert 0.5 < curve.mean[0] < curve.mean[-1] - 0.05 < 0.8
    assert (curve.num_labels, curve.num_prompts, curve.num_held_out) == (240, 120, 30)


def test_the_seed_draws_the_splits_and_nothing_else_does():
    vectors, scores, groups = labelled(40)
    first, again, other = (
        learning_curve(vectors, scores, numbers, seed=seed)
        for numbers, seed in ((groups, 3), (10 * groups + 7, 3), (groups, 4))
    )
    assert first is not None and again is not None and other is not None
    assert np.array_equal(first.agreement, again.agreement)
    assert not np.array_equal(first.agreement, other.agreement)


def test_errors_of_the_mean_are_those_of_other_data():
    means, claimed = [], []
    for seed in range(24):
        curve = learning_curve(*labelled(60, seed=seed), sizes=[20, 40, 80], num_splits=8, seed=seed)
        assert curve is not None
        means.append(curve.mean)
        claimed.append(np.sqrt(np.diag(curve.covariance)))
    real = np.std(means, axis=0, ddof=1)
    # The standard deviation of 24 values is known to 15%.
    assert np.mean(claimed, axis=0) == pytest.approx(real, rel=0.4)


def test_noise_of_a_new_measurement_falls_with_its_prompts_and_labels():
    curve = learning_curve(*labelled(60))
    assert curve is not None and curve.prompt_variance > 0
    assert curve.noise(100, 50) < curve.noise(100, 20) and curve.noise(200, 20) <= curve.noise(100, 20)


def test_comparisons_have_a_curve_of_the_same_scale():
    rng = np.random.default_rng(0)
    vectors, scores, groups = labelled(120)
    differences, margins = vectors[::2] - vectors[1::2], scores[::2] - scores[1::2]
    curve = learning_curve(differences, margins > 0, groups[::2], compares=True, num_splits=6)
    assert curve is not None
    assert 0.5 < curve.mean[0] < curve.mean[-1] < 0.9
    drawn = learning_curve(differences, rng.random(120) < 0.5, groups[::2], compares=True, num_splits=6)
    assert drawn is not None and abs(drawn.mean[-1] - 0.5) < 3 * np.sqrt(drawn.covariance[-1, -1])


def test_data_that_is_learnt_perfectly_still_has_an_error():
    vectors, _, groups = labelled(40)
    curve = learning_curve(vectors, vectors[:, 0].astype(np.float64) * 5, groups)
    assert curve is not None and curve.mean[-1] > 0.9
    assert np.linalg.cholesky(curve.covariance).shape == (len(curve.sizes), len(curve.sizes))


@pytest.mark.parametrize(("num_prompts", "per_prompt"), [(MIN_LABELS - 1, 1), (MIN_PROMPTS - 1, 4)])
def test_too_few_labels_make_no_curve(num_prompts, per_prompt):
    assert learning_curve(*labelled(num_prompts, per_prompt)) is None


def test_equal_scores_make_no_curve():
    vectors, scores, groups = labelled(40)
    assert learning_curve(vectors, np.zeros_like(scores), groups) is None


def test_a_prompt_with_nearly_all_labels_makes_no_curve():
    vectors, scores, groups = labelled(60, 1)
    # Where the first of 17 prompts is held out, 13 labels are left.
    assert learning_curve(vectors, scores, np.where(groups < 44, 0, groups)) is None


def test_prompts_of_more_labels_than_are_compared_make_no_curve():
    groups = np.repeat(np.arange(MIN_PROMPTS), MAX_HELD_OUT_LABELS)
    vectors = np.random.default_rng(0).standard_normal((len(groups), 1)).astype(np.float32)
    assert learning_curve(vectors, vectors[:, 0].astype(np.float64), groups, num_splits=2) is None


def test_the_fewest_labels_make_a_curve():
    curve = learning_curve(*labelled(MIN_LABELS, 1))
    assert curve is not None and np.isfinite(curve.covariance).all()


def test_no_more_labels_are_held_out_than_are_compared():
    groups = np.repeat(np.arange(60), 100)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(groups), 4)).astype(np.float32)
    curve = learning_curve(vectors, vectors[:, 0].astype(np.float64), groups, sizes=[50, 100], num_splits=2)
    assert curve is not None and curve.num_held_out == MAX_HELD_OUT_LABELS / 100


@pytest.mark.parametrize("sizes", [[], [1, 20], [20, 20], [40, 20], [20, 61]])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"sizes must rise from at least 2 to at most the 60 labels left, got \["):
        learning_curve(*labelled(40), sizes=sizes)


def test_labels_without_vectors_or_numbers_are_refused():
    vectors, scores, groups = labelled(40)
    with pytest.raises(ValueError, match="vectors, labels and groups must be as many, got 79, 80 and 80"):
        learning_curve(vectors[1:], scores, groups)
    with pytest.raises(ValueError, match="finite, got NaN"):
        learning_curve(vectors, np.where(groups == 3, np.nan, scores), groups)
