"""Outcomes of prompts: exactly those of SPG on all n samples; and their counts."""

import numpy as np
import pytest

from rayrl.algorithms.synthesis import synthetic_pair
from rayrl.records import to_table
from rayrl.stages.synthesis.outcomes import (
    Outcome,
    add_counts,
    best_worst_outcome,
    count_outcomes,
    synthesize_outcome,
    tenths,
)
from tests.color_answers import ANSWERS, CLUSTERS, NUM_EMPTY, REWARDS, SAMPLED


def expected(prompt, clusters, gamma, seed=0):
    """`synthetic_pair` on the samples themselves, repeats written out, and the empty ones."""
    index = [i for i, (_, num_samples) in enumerate(ANSWERS[prompt]) for _ in range(num_samples)]
    ids = [clusters[i] for i in index] + [-1] * NUM_EMPTY.get(prompt, 0)
    rewards = [REWARDS.get(ANSWERS[prompt][i][0].strip()) for i in index] + [None] * NUM_EMPTY.get(prompt, 0)
    drawn = {
        (index[made.chosen], index[made.rejected])
        for draw in range(200)
        if (made := synthetic_pair(ids, rewards, gamma, np.random.default_rng(draw))).chosen is not None
        and made.rejected is not None
    }
    return drawn, synthetic_pair(ids, rewards, gamma, np.random.default_rng(0))


def outcome(prompt, gamma, seed=0):
    scores = [REWARDS.get(text.strip()) for text, _ in ANSWERS[prompt]]
    return synthesize_outcome(SAMPLED[prompt], CLUSTERS[prompt], scores, gamma=gamma, seed=seed)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("prompt", list(ANSWERS))
def test_an_outcome_is_what_synthetic_pair_says_of_all_samples(prompt, gamma):
    made = [outcome(prompt, gamma, seed) for seed in range(100)]
    possible, one = expected(prompt, CLUSTERS[prompt], gamma)
    assert {(m.chosen, m.rejected) for m in made if m.reason == "accepted"} == possible
    assert {(m.confidence, len(m.cluster_sizes), sum(m.cluster_sizes)) for m in made} == {
        (one.confidence, one.num_clusters, 10)
    }
    at_any_gamma, _ = expected(prompt, CLUSTERS[prompt], 0.0)
    assert {(m.chosen, m.rejected) for m in made if m.chosen is not None} == at_any_gamma
    assert outcome(prompt, gamma, 3) == outcome(prompt, gamma, 3)


def test_repeats_and_empty_samples_count():
    assert outcome("p0", 0.5).confidence == 0.5  # 2 of 5 different texts are red, but 5 of 10 samples
    assert (outcome("p0", 0.5).reason, outcome("p0", 0.6).reason) == ("accepted", "low_confidence")
    assert (outcome("p1", 0.4).confidence, outcome("p1", 0.4).reason) == (0.4, "abstained")  # most say nothing


def test_every_refusal_has_its_reason():
    assert [outcome(p, 0.5).reason for p in ANSWERS] == [
        "accepted",
        "low_confidence",
        "one_cluster",
        "low_confidence",
        "abstained",
        "one_cluster",
    ]


def test_the_control_pairs_best_and_worst():
    made = best_worst_outcome("p0", [1.0, 2.0, 3.0, 0.0, None])
    assert (made.chosen, made.rejected, made.confidence, made.cluster_sizes) == (2, 3, None, [])
    scores = ([1.0, 1.0], [1.0, None], [None, None], [1.0], [], [1.0, 1.0, None])
    reasons = ["tied", "abstained", "abstained", "tied", "abstained", "tied"]
    assert [best_worst_outcome("p0", s).reason for s in scores] == reasons


def test_a_confidence_is_counted_at_the_gamma_it_passes():
    assert [tenths(k / 10) for k in range(1, 11)] == list(range(1, 11))
    assert [tenths(c) for c in (1 / 3, 0.5, 0.51, 1.0)] == [4, 5, 6, 10]


def test_blocks_are_counted_apart_and_added_up():
    outcomes = [outcome(prompt, 0.5) for prompt in ANSWERS]
    blocks = [to_table(part, Outcome) for part in (outcomes[:1], outcomes[1:4], [], outcomes[4:])]
    counts = add_counts([count_outcomes(block) for block in blocks])
    assert counts == add_counts([count_outcomes(to_table(outcomes, Outcome))])
    assert list(counts.outcomes.items()) == [
        ("accepted", 1),
        ("one_cluster", 2),
        ("low_confidence", 2),
        ("abstained", 1),
    ]
    assert list(counts.confidences.items()) == [("0.4", 2), ("0.5", 1), ("0.7", 1), ("1.0", 2)]
    assert list(counts.cluster_sizes) == ["1", "2", "3", "4", "5", "7", "10"], "in the order of numbers"
    assert (counts.num_prompts, counts.num_pairs, counts.acceptance_rate) == (6, 1, 1 / 6)


def test_prompts_that_are_not_clustered_have_a_reason_only():
    outcomes = [best_worst_outcome("p0", [1.0, 2.0]), best_worst_outcome("p1", [1.0, 1.0])]
    counts = add_counts([count_outcomes(to_table(outcomes, Outcome))])
    assert counts.outcomes == {"accepted": 1, "tied": 1}
    assert counts.confidences == counts.cluster_sizes == counts.num_clusters == {}
    assert set(counts.pairs_by_gamma.values()) == {0}
