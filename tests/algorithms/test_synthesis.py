from collections import Counter
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from rayrl.algorithms.pairing import best_worst
from rayrl.algorithms.synthesis import Synthesis, synthetic_pair


def pair(clusters, rewards, gamma=0.5, seed=0):
    made = synthetic_pair(clusters, rewards, gamma, np.random.default_rng(seed))
    return made.chosen, made.rejected


def test_the_largest_clusters_best_against_the_other_clusters():
    clusters, rewards = [0, 1, 1, 2, 1], [9.0, 1.0, 3.0, 2.0, 2.0]
    made = [synthetic_pair(clusters, rewards, 0.5, np.random.default_rng(seed)) for seed in range(20)]
    assert {m.chosen for m in made} == {2}, "index 0 has the highest reward, in a small cluster"
    assert {m.rejected for m in made} == {0, 3}
    assert {(m.confidence, m.num_clusters) for m in made} == {(0.6, 3)}


def test_rejected_is_uniform_over_responses_not_over_clusters():
    clusters, rng = [0, 0, 0, 0, 1, 1, 1, 2], np.random.default_rng(0)
    drawn = Counter(synthetic_pair(clusters, [0.0] * 8, 0.5, rng).rejected for _ in range(4000))
    assert set(drawn) == {4, 5, 6, 7}
    assert max(abs(count / 4000 - 1 / 4) for count in drawn.values()) < 0.03  # 4 standard errors


@pytest.mark.parametrize(
    ("rewards", "chosen", "rejected"),
    [
        ([1.0, 2.0, 3.0, 0.0], 2, {0, 1}),
        ([1.0, 4.0, 3.0, 0.0], 1, {2, 3}),
        ([5.0, 5.0, 5.0, 5.0], 0, {2, 3}),
        ([None, None, -1.0, -2.0], 2, set()),
        ([None, 0.0, -1.0, None], 1, {2}),
    ],
)
def test_between_equally_large_clusters_the_highest_reward_decides(rewards, chosen, rejected):
    pairs = {pair([0, 0, 1, 1], rewards, seed=seed) for seed in range(20)}
    assert pairs == ({(chosen, r) for r in rejected} or {(None, None)})


@pytest.mark.parametrize(
    ("clusters", "gamma", "accepted"),
    [
        ([0, 0, 0, 1, 1, 2, 3, 4, 5, 6], 0.3, True),
        ([0, 0, 0, 1, 1, 2, 3, 4, 5, 6], 0.31, False),
        ([0, 0, 0, 0, 0, 1, 2, 3, 4, 5], 0.5, True),
        ([0, 1, 2, 3], 0.0, True),
        ([0, 1, 2, 3], 0.5, False),
        ([0, 0, 0, 1], 1.0, False),
        ([0, 0, 0, 0], 1.0, False),
    ],
)
def test_gamma_is_the_least_confidence_accepted(clusters, gamma, accepted):
    chosen, rejected = pair(clusters, [float(i) for i in range(len(clusters))], gamma)
    assert (chosen is not None, rejected is not None) == (accepted, accepted)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_one_cluster_leaves_nothing_to_reject(gamma):
    made = synthetic_pair([7, 7, 7], [1.0, 2.0, 3.0], gamma, np.random.default_rng(0))
    assert made == Synthesis(confidence=1.0, num_clusters=1, chosen=None, rejected=None)


def test_a_refusal_still_tells_its_confidence():
    made = synthetic_pair([4, 9, 4, 2, 1], [0.0] * 5, 0.5, np.random.default_rng(0))
    assert made == Synthesis(confidence=0.4, num_clusters=4, chosen=None, rejected=None)
    with pytest.raises(FrozenInstanceError):
        made.chosen = 1


def test_abstentions_count_towards_size_and_enter_no_pair():
    clusters = [0, 0, 0, 1, 1]
    assert pair(clusters, [None, 1.0, None, 5.0, None]) == (1, 3)
    assert pair(clusters, [None, None, None, 5.0, 6.0]) == (None, None)
    assert pair(clusters, [1.0, 2.0, 3.0, None, None]) == (None, None)
    assert synthetic_pair(clusters, [None] * 5, 0.0, np.random.default_rng(0)).confidence == 0.6


def test_a_refusal_draws_nothing():
    rng = np.random.default_rng(0)
    synthetic_pair([0, 1, 2], [1.0, 2.0, 3.0], 0.5, rng)
    synthetic_pair([0, 0, 0], [1.0, 2.0, 3.0], 0.5, rng)
    assert rng.integers(1 << 30) == np.random.default_rng(0).integers(1 << 30)


def test_the_reward_control_ignores_the_clusters():
    """Ranking by the reward model may prefer a minority meaning, which synthesis never does."""
    clusters, rewards = [0, 0, 0, 1], [1.0, 2.0, 0.0, 3.0]
    assert best_worst(rewards, 0.0) == [(3, 2)]
    assert pair(clusters, rewards) == (1, 3)


@pytest.mark.parametrize(("clusters", "rewards"), [([], []), ([0, 1], [1.0])])
def test_wrong_lengths_are_refused(clusters, rewards):
    with pytest.raises(ValueError, match="a cluster and a reward per response"):
        pair(clusters, rewards)
