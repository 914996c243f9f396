"""The loop of active learning, on a pool whose labels are known."""

import numpy as np
import pytest

from rayrl.algorithms.acquisition import MIN_LABELS, Acquisition, Answers, Labels, acquire, meter_labels
from rayrl.algorithms.heads import mean_and_spread
from rayrl.algorithms.meter import LabelMeter, label_meter, stops
from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards

STRIDE, PER_PROMPT, WIDTH = 8, 4, 6


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((80, WIDTH)).astype(np.float32) + 2
    ids = np.arange(80) // PER_PROMPT * STRIDE + np.arange(80) % PER_PROMPT
    return ids, vectors, vectors @ rng.standard_normal(WIDTH)


def shards_of(ids, vectors):
    return LocalShards([CoresetShard(ids[:40], vectors[:40]), CoresetShard(ids[40:], vectors[40:])])


def oracle(ids, scores, *, abstains=(), asked=None):
    known = dict(zip(ids.tolist(), scores.tolist(), strict=True))

    def ask(questions):
        if asked is not None:
            asked.append(questions)
        if questions.shape[1] == 2:
            answers = [float(known[a] > known[b]) for a, b in questions.tolist()]
        else:
            answers = [None if i in abstains else known[i] for i in questions[:, 0].tolist()]
        return Answers(scores=answers, num_spent=sum(answer is not None for answer in answers))

    return ask


KNOWLEDGE = Knowledge(prompt_stride=STRIDE, seed=2)


def by(name, **settings):
    return Acquisition(strategy=STRATEGIES[name], knowledge=KNOWLEDGE, **settings)


@pytest.mark.parametrize("name", ["k_center", "random_by_prompt"])
def test_a_strategy_that_learns_nothing_picks_the_same_in_batches_and_at_once(pool, name):
    ids, vectors, scores = pool
    at_once, parts = (
        acquire(ids, shards_of(ids, vectors), by(name, num_batches=n), 30, oracle(ids, scores)).ids.ravel()
        for n in (1, 5)
    )
    assert at_once.tolist() == parts.tolist()


def test_the_first_batch_is_by_another_strategy_and_the_next_by_heads_on_its_answers(pool):
    ids, vectors, scores = pool
    asked: list[np.ndarray] = []
    heads = []

    def spread_first(shards, num, knowledge):
        heads.append(knowledge.heads)
        return STRATEGIES["uncertainty"].choose(shards, num, knowledge)

    strategy = STRATEGIES["uncertainty"].__class__(choose=spread_first, reads_vectors=True, reads_heads=True)
    first = STRATEGIES["random"]
    ask = oracle(ids, scores, asked=asked)
    acquisition = Acquisition(strategy=strategy, first=first, num_batches=4, knowledge=KNOWLEDGE)
    acquire(ids, shards_of(ids, vectors), acquisition, 40, ask)
    assert [len(batch) for batch in asked] == [10, 10, 10, 10] and len(heads) == 3
    assert asked[0].ravel().tolist() == first.choose(ids, 10, KNOWLEDGE).ids
    # Forty exact labels of a linear score: the last heads know it, on vectors as they came.
    assert np.corrcoef(mean_and_spread(heads[-1].scores(vectors))[0], scores)[0, 1] > 0.99


def test_abstentions_that_cost_nothing_are_replaced_and_the_budget_is_spent(pool):
    ids, _, scores = pool
    abstains = set(ids[::3].tolist())
    labels = acquire(ids, None, by("random", num_batches=2), 40, oracle(ids, scores, abstains=abstains))
    assert len(labels.answered) == 40 and len(np.unique(labels.ids)) == len(labels.ids)


def test_it_ends_where_nothing_is_left_or_nobody_answers(pool):
    ids, _, scores = pool
    everything = acquire(ids, None, by("random", num_batches=3), 500, oracle(ids, scores))
    assert len(everything.answered) == len(ids)
    asked: list[np.ndarray] = []
    nobody = oracle(ids, scores, abstains=set(ids.tolist()), asked=asked)
    labels = acquire(ids, None, by("random", num_batches=4), 40, nobody)
    assert len(asked) == 3 and len(labels.answered) == 0


def test_it_stops_where_it_is_told_that_the_labels_are_enough(pool):
    ids, _, scores = pool
    acquisition = by("random", num_batches=6)
    labels = acquire(ids, None, acquisition, 60, oracle(ids, scores), stop=lambda labels: len(labels.answered) >= 25)
    assert len(labels.answered) == 30


def test_pairs_are_asked_two_by_two_and_teach_the_heads_the_order(pool):
    ids, vectors, scores = pool
    asked: list[np.ndarray] = []
    ask = oracle(ids, scores, asked=asked)
    shards = shards_of(ids, vectors)
    labels = acquire(ids, shards, by("pair_bald", first=STRATEGIES["random_pairs"], num_batches=2), 20, ask)
    assert labels.ids.shape == (20, 2) and len(asked) == 2
    assert len(np.unique(labels.ids[:, 0] // STRIDE)) == 20
    assert (labels.ids[:, 0] // STRIDE == labels.ids[:, 1] // STRIDE).all()


def test_known_labels_cost_nothing_and_are_not_asked_again(pool):
    ids, vectors, scores = pool
    known = Labels().with_answers(ids[:MIN_LABELS, None], scores[:MIN_LABELS].tolist())
    asked: list[np.ndarray] = []
    ask = oracle(ids, scores, asked=asked)
    labels = acquire(ids, shards_of(ids, vectors), by("uncertainty"), 10, ask, known=known)
    assert len(labels.ids) == MIN_LABELS + 10 and not set(np.concatenate(asked).ravel()) & set(ids[:MIN_LABELS])


def test_the_label_meter_reads_what_was_answered(pool):
    ids, vectors, scores = pool
    shards = shards_of(ids, vectors)
    read: list[LabelMeter] = []

    def is_enough(labels):
        read.append(meter_labels(shards, labels, KNOWLEDGE))
        return stops(read[-1], 0.5)

    ask = oracle(ids, scores, abstains=ids[:3].tolist())
    labels = acquire(ids, shards, by("random", num_batches=7), 77, ask, stop=is_enough)
    rows = labels.answered
    assert len(rows) == read[-1].num_labels < 77, "exact labels of a linear score are soon enough"
    assert [meter.family for meter in read[:2]] == [None, None] and read[-1].family is not None
    places = np.searchsorted(ids, labels.ids[rows, 0])
    expected = label_meter(vectors[places], scores[places], ids[places] // STRIDE, seed=KNOWLEDGE.seed)
    assert [point.num_labels for point in read[-1].measured] == [point.num_labels for point in expected.measured]
    assert read[-1].agreement is not None and expected.agreement is not None
    assert read[-1].agreement.value == pytest.approx(expected.agreement.value, abs=0.02)


def test_the_label_meter_reads_comparisons_without_ties():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((80, WIDTH)).astype(np.float32)
    ids = np.arange(80) // 2 * STRIDE + np.arange(80) % 2
    known = dict(zip(ids.tolist(), vectors[:, 0].tolist(), strict=True))
    pairs = ids.reshape(-1, 2)
    scores = [0.5 if a % (5 * STRIDE) == 0 else float(known[a] > known[b]) for a, b in pairs.tolist()]
    labels = Labels().with_answers(pairs, scores)
    meter = meter_labels(LocalShards([CoresetShard(ids, vectors)]), labels, KNOWLEDGE)
    assert (meter.compares, meter.num_labels, meter.num_prompts) == (True, 32, 32)
    assert meter.agreement is not None and meter.agreement.value > 0.7
