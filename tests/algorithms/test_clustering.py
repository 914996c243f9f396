import itertools

import jaxtyping
import numpy as np
import pytest
from beartype import beartype

from rayrl.algorithms import clustering
from rayrl.algorithms.clustering import CLUSTERINGS, CONTRADICTION, ENTAILMENT, NEUTRAL, Clustering, distinct

checked = jaxtyping.jaxtyped(typechecker=beartype)
entailment_clusters = checked(clustering.entailment_clusters)
embedding_clusters = checked(clustering.embedding_clusters)

DEFINITIONS = ("strict", "kuhn2023", "farquhar2024")


def matrix(n, labels, default=CONTRADICTION):
    """(n, n) labels: `labels[i, j]` where given, `default` elsewhere, entailment on the diagonal."""
    filled = np.full((n, n), default)
    np.fill_diagonal(filled, ENTAILMENT)
    for (i, j), label in labels.items():
        filled[i, j] = label
    return filled


def equal(*pairs):
    """Labels that make the pairs equivalent by every definition."""
    return {key: ENTAILMENT for i, j in pairs for key in ((i, j), (j, i))}


@pytest.mark.parametrize(
    ("forward", "backward", "merging"),
    [
        (ENTAILMENT, ENTAILMENT, {"strict", "kuhn2023", "farquhar2024"}),
        (ENTAILMENT, NEUTRAL, {"kuhn2023", "farquhar2024"}),
        (NEUTRAL, NEUTRAL, {"kuhn2023"}),
        (ENTAILMENT, CONTRADICTION, set()),
        (NEUTRAL, CONTRADICTION, set()),
        (CONTRADICTION, CONTRADICTION, set()),
    ],
)
def test_which_labels_make_two_texts_equivalent(forward, backward, merging):
    for first, second in ((forward, backward), (backward, forward)):
        labels = matrix(2, {(0, 1): first, (1, 0): second})
        merged = {d for d in DEFINITIONS if entailment_clusters(labels, d).tolist() == [0, 0]}
        apart = {d for d in DEFINITIONS if entailment_clusters(labels, d).tolist() == [0, 1]}
        assert (merged, apart) == (merging, set(DEFINITIONS) - merging)


def test_a_text_equivalent_to_two_seeds_goes_to_the_first_or_to_the_last():
    labels = matrix(3, equal((0, 2), (1, 2)))
    assert entailment_clusters(labels, "strict").tolist() == [0, 1, 0]
    assert entailment_clusters(labels, "farquhar2024").tolist() == [0, 1, 1]
    assert entailment_clusters(labels, "kuhn2023").tolist() == [0, 1, 1]


def test_only_kuhns_release_lets_a_member_recruit():
    """A chain: 1 joins 0, and 2 is equivalent to 1 only."""
    labels = matrix(3, equal((0, 1), (1, 2)))
    assert entailment_clusters(labels, "strict").tolist() == [0, 0, 1]
    assert entailment_clusters(labels, "farquhar2024").tolist() == [0, 0, 1]
    assert entailment_clusters(labels, "kuhn2023").tolist() == [0, 0, 0]


def test_a_later_member_overwrites_an_earlier_seed_in_kuhns_release():
    """3 is equivalent to the seed 0 and to 2, a member of 1's cluster."""
    labels = matrix(4, equal((0, 3), (1, 2), (2, 3)))
    assert entailment_clusters(labels, "strict").tolist() == [0, 1, 1, 0]
    assert entailment_clusters(labels, "farquhar2024").tolist() == [0, 1, 1, 0]
    assert entailment_clusters(labels, "kuhn2023").tolist() == [0, 1, 1, 1]


def test_all_three_definitions_differ_on_one_matrix():
    labels = matrix(4, {**equal((0, 1), (1, 2)), (2, 0): NEUTRAL, (0, 2): ENTAILMENT, (0, 3): NEUTRAL, (3, 0): NEUTRAL})
    assert entailment_clusters(labels, "strict").tolist() == [0, 0, 1, 2]
    assert entailment_clusters(labels, "farquhar2024").tolist() == [0, 0, 0, 1]
    assert entailment_clusters(labels, "kuhn2023").tolist() == [0, 0, 0, 0]


def test_long_open_ended_answers():
    """All neutral: singletons under the paper's rule, one cluster under its release's."""
    labels = matrix(5, {}, default=NEUTRAL)
    assert entailment_clusters(labels, "strict").tolist() == [0, 1, 2, 3, 4]
    assert entailment_clusters(labels, "farquhar2024").tolist() == [0, 1, 2, 3, 4]
    assert entailment_clusters(labels, "kuhn2023").tolist() == [0, 0, 0, 0, 0]


def by_overwriting(labels, definition):
    """The releases' shape: every text, or every text without a cluster, stamps its id on all later equivalents."""
    n, ids = len(labels), {}
    for i in range(n):
        if definition == "farquhar2024" and i in ids:
            continue
        ids.setdefault(i, i)
        for j in range(i + 1, n):
            both = sorted((labels[i, j], labels[j, i]))
            if both[0] != CONTRADICTION and (definition == "kuhn2023" or both != [NEUTRAL, NEUTRAL]):
                ids[j] = ids[i]
    order = list(dict.fromkeys(ids[i] for i in range(n)))
    return [order.index(ids[i]) for i in range(n)]


@pytest.mark.parametrize("definition", ["kuhn2023", "farquhar2024"])
def test_the_releases_overwriting_loops_give_the_same(definition):
    rng = np.random.default_rng(0)
    for labels in rng.choice(3, (300, 7, 7), p=[0.5, 0.25, 0.25]):
        assert entailment_clusters(labels, definition).tolist() == by_overwriting(labels, definition)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_ids_are_consecutive_and_neither_direction_nor_diagonal_counts(definition):
    rng = np.random.default_rng(1)
    for labels in rng.integers(0, 3, (100, 6, 6)):
        ids = entailment_clusters(labels, definition).tolist()
        assert list(dict.fromkeys(ids)) == list(range(max(ids) + 1))
        assert entailment_clusters(labels.T, definition).tolist() == ids
        np.fill_diagonal(labels, CONTRADICTION)
        assert entailment_clusters(labels, definition).tolist() == ids


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_decided_pair_has_the_same_clusters_whatever_its_other_direction(definition):
    is_undecided = CLUSTERINGS[definition].is_undecided
    for forward in (CONTRADICTION, NEUTRAL, ENTAILMENT):
        found = set()
        for backward in (CONTRADICTION, NEUTRAL, ENTAILMENT):
            clusters = entailment_clusters(matrix(2, {(0, 1): forward, (1, 0): backward}), definition)
            found.add(tuple(clusters.tolist()))
        assert is_undecided(np.array([forward])).tolist() == [len(found) > 1]


def test_an_added_definition_reads_both_directions_unless_it_knows_better(monkeypatch):
    singletons = Clustering(reads="entailment", find=lambda labels: np.arange(len(labels)))
    before = entailment_clusters(matrix(3, equal((0, 2))), "strict")
    monkeypatch.setitem(CLUSTERINGS, "singletons", singletons)
    assert entailment_clusters(matrix(3, equal((0, 2))), "singletons").tolist() == [0, 1, 2]
    assert singletons.is_undecided(np.array([CONTRADICTION, NEUTRAL, ENTAILMENT])).all()
    assert entailment_clusters(matrix(3, equal((0, 2))), "strict").tolist() == before.tolist() == [0, 1, 0]


def test_entries_tell_their_input():
    by_entailment = {name for name, clustering in CLUSTERINGS.items() if clustering.reads == "entailment"}
    assert by_entailment == set(DEFINITIONS)
    assert set(CLUSTERINGS) - by_entailment == {"embedding"}
    assert CLUSTERINGS["embedding"].find(at_degrees(0, 30, 20), 0.9).tolist() == [0, 1, 0]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_true_partition_is_found_in_any_order(definition):
    groups = np.array([0, 0, 0, 1, 1, 2])
    for order in itertools.permutations(range(6)):
        members = groups[list(order)]
        labels = np.where(members[:, None] == members, ENTAILMENT, CONTRADICTION)
        ids = entailment_clusters(labels, definition)
        assert ((ids[:, None] == ids) == (members[:, None] == members)).all()


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_one_text_and_none(definition):
    assert entailment_clusters(np.full((1, 1), ENTAILMENT), definition).tolist() == [0]
    assert entailment_clusters(np.empty((0, 0), int), definition).tolist() == []


def at_degrees(*degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, len(degrees) + 1)[:, None]


def test_embedding_clusters_compare_with_seeds_by_angle():
    vectors = at_degrees(0, 20, 40, 20, 45)
    assert embedding_clusters(vectors, np.cos(np.deg2rad(25))).tolist() == [0, 0, 1, 0, 1]
    assert embedding_clusters(vectors, np.cos(np.deg2rad(15))).tolist() == [0, 1, 2, 1, 2]
    assert embedding_clusters(vectors.astype(np.float32), -1.1).tolist() == [0] * 5


def test_embedding_clusters_take_the_first_seed_not_the_nearest():
    assert embedding_clusters(at_degrees(0, 30, 20), np.cos(np.deg2rad(25))).tolist() == [0, 1, 0]


def test_a_zero_vector_is_alone():
    assert embedding_clusters(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), 0.5).tolist() == [0, 1, 2]


def test_distinct_keeps_order_and_joins_equal_texts():
    texts = ["b", "a", "b", "c", "a"]
    unique, inverse = distinct(texts)
    assert unique == ["b", "a", "c"]
    assert inverse.tolist() == [0, 1, 0, 2, 1]
    assert [unique[i] for i in inverse] == texts
    assert entailment_clusters(matrix(3, {}), "strict")[inverse].tolist() == [0, 1, 0, 2, 1]
    assert distinct([])[0] == []
