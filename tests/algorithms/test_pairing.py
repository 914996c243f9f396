import pytest

from rayrl.algorithms.pairing import PAIRINGS, Pairing, best_worst, margin_pairs, num_pairs_planned


@pytest.mark.parametrize(
    ("scores", "min_margin", "pairs"),
    [
        ([1.0, 3.0, 2.0], 0.0, [(1, 0)]),
        ([2.0, 5.0, 5.0, 2.0], 0.0, [(1, 0)]),
        ([3.0, 3.0, 3.0], 0.0, []),
        ([1.0, 2.0], 1.0, []),
        ([1.0, 2.1], 1.0, [(1, 0)]),
        ([None, 4.0, None, 1.0], 0.0, [(1, 3)]),
        ([None, 4.0], 0.0, []),
        ([None, None], 0.0, []),
        ([], 0.0, []),
    ],
)
def test_best_worst(scores, min_margin, pairs):
    assert best_worst(scores, min_margin) == pairs


def test_margin_pairs_are_all_pairs_beyond_the_margin():
    assert margin_pairs([1.0, 3.0, 2.0], 0.0) == [(1, 0), (1, 2), (2, 0)]
    assert margin_pairs([1.0, 3.0, 2.0], 1.0) == [(1, 0)]
    assert margin_pairs([2.0, 2.0, None, 0.0], 0.0) == [(0, 3), (1, 3)]
    assert margin_pairs([5.0], 0.0) == []


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_plan_is_reached_without_ties(k):
    scores = [float(i) for i in range(k)]
    assert num_pairs_planned("best_worst", 7, k) == 7 * len(best_worst(scores, 0.0))
    assert num_pairs_planned("margin", 7, k) == 7 * len(margin_pairs(scores, 0.0))
    for name, pairing in PAIRINGS.items():
        assert num_pairs_planned(name, 7, k) == 7 * len(pairing.pairs(scores, 0.0))


def test_an_added_pairing_is_planned(monkeypatch):
    first_two = Pairing(pairs=lambda scores, min_margin: [(0, 1)], num_pairs=lambda k: 1)
    monkeypatch.setitem(PAIRINGS, "first_two", first_two)
    assert num_pairs_planned("first_two", 7, 4) == 7
    assert num_pairs_planned("margin", 7, 4) == 42
