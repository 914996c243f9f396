"""Where the heads are sure is measured; there nothing is asked."""

import numpy as np
import pytest

from rayrl.algorithms.acquisition import Acquisition, Answers, acquire
from rayrl.algorithms.heads import Heads
from rayrl.algorithms.routing import held_out_pairs, margins_of, sure_margin
from rayrl.algorithms.selection import ROUTED, STRATEGIES, CoresetShard, Knowledge, LocalShards

STRIDE, PER_PROMPT, WIDTH = 8, 4, 5


def test_the_margin_is_the_smallest_from_which_on_enough_are_right():
    margins = np.arange(100, dtype=float)
    is_right = margins >= 20  # of the 80 largest all are right, of all 100 only 80
    assert sure_margin(margins, is_right, 0.999) == 20
    # 80 of the 86 largest are 0.930 +- 0.027, of 87 0.920 +- 0.029; of 95 0.842 +- 0.037, of 96 0.833 +- 0.038.
    assert sure_margin(margins, is_right, 0.9) == 14 and sure_margin(margins, is_right, 0.8) == 5
    assert sure_margin(margins, ~is_right, 0.9) == np.inf
    assert sure_margin(margins[:19], np.ones(19, bool), 0.9) == np.inf, "too few to know"


def test_a_margin_is_the_mean_in_standard_deviations():
    margins, first = margins_of(np.array([[1.0, 3.0], [-4.0, -4.0], [0.0, 0.0], [-1.0, 1.0]]))
    assert margins[0] == pytest.approx(2 / np.sqrt(2)) and margins[1] == np.inf and (margins[2:] == 0).all()
    assert first.tolist() == [True, False, False, False]


def pool_of(num_prompts, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_prompts * PER_PROMPT, WIDTH)).astype(np.float32) + 1
    rows = np.arange(len(vectors))
    ids = rows // PER_PROMPT * STRIDE + rows % PER_PROMPT
    return ids, vectors, vectors @ np.array([2.0, -1, 0.5, 0, 1]) + noise * rng.standard_normal(len(vectors))


def test_held_out_pairs_tell_a_clear_signal_from_none():
    ids, vectors, scores = pool_of(40, noise=0.3)
    margins, is_right = held_out_pairs(vectors, scores, ids // STRIDE)
    assert len(margins) == 40 * 6 and is_right.mean() > 0.85
    assert is_right[margins > np.median(margins)].mean() > is_right[margins < np.median(margins)].mean()
    noise = np.random.default_rng(1).standard_normal(len(ids))
    assert abs(held_out_pairs(vectors, noise, ids // STRIDE)[1].mean() - 0.5) < 0.12
    # Labels of one response a prompt have no pair of one prompt: those held out together are compared.
    alone = ids % STRIDE == 0
    assert len(held_out_pairs(vectors[alone], scores[alone], ids[alone] // STRIDE)[0]) == 5 * 8 * 7 // 2


def test_margins_are_those_of_as_many_heads_as_choose():
    """With two heads a standard deviation is another one than with twenty."""
    ids, vectors, scores = pool_of(40, noise=0.3)
    few, many = (held_out_pairs(vectors, scores, ids // STRIDE, num_heads=num)[0] for num in (2, 20))
    assert len(few) == len(many) and np.median(few) > 1.2 * np.median(many)


def test_unsure_pairs_are_the_best_and_the_worst_by_rising_margin():
    """Heads x and x + 1 s: of prompt 0 the best and worst differ by 4 in both, of prompt 1 by 1 and 3."""
    vectors = np.array([[0, 0], [4, 0], [2, 0], [0, 0], [1, 1], [9, 0]], np.float32)
    ids = np.array([0, 1, 2, STRIDE, STRIDE + 1, 2 * STRIDE])
    heads = Heads(weights=np.array([[1, 1], [0, 2]], np.float32), bias=np.zeros(2), noise=1.0, ridge=1.0)
    pool = LocalShards([CoresetShard(ids, vectors)])

    def picks(sure, taken=()):
        knowledge = Knowledge(heads=heads, prompt_stride=STRIDE, sure_margin=sure, taken=np.array(taken, np.int64))
        return ROUTED.choose(pool, 10, knowledge).ids

    assert picks(np.inf) == [STRIDE + 1, STRIDE], "the heads agree on prompt 0: its margin is infinite"
    assert picks(np.inf, [STRIDE]) == [STRIDE + 1] and picks(np.inf, [STRIDE, STRIDE + 1]) == []
    assert picks(2 / np.sqrt(2) + 1e-3) == [STRIDE + 1, STRIDE] and picks(1.0) == []


def test_a_budget_is_left_unspent_once_the_heads_are_sure():
    ids, vectors, scores = pool_of(60)
    known = dict(zip(ids.tolist(), scores.tolist(), strict=True))

    def ask(questions):
        return Answers(scores=[known[i] for i in questions[:, 0].tolist()], num_spent=len(questions))

    labels = acquire(
        ids,
        LocalShards([CoresetShard(ids, vectors)]),
        Acquisition(
            strategy=ROUTED, first=STRATEGIES["random"], num_batches=10, knowledge=Knowledge(prompt_stride=STRIDE)
        ),
        200,
        ask,
    )
    assert 20 <= len(labels.ids) < 120, "an exact linear score is known after a few batches"
