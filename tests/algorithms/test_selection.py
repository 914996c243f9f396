import itertools
import pickle

import numpy as np
import pytest

from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards, k_center, random_selection
from rayrl.errors import ConfigError, DataError


def isotropic(n, d):
    vectors = np.random.default_rng(1).standard_normal((n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(n, d):
    rng = np.random.default_rng(2)
    return (rng.standard_normal((12, d))[rng.integers(0, 12, n)] + 0.05 * rng.standard_normal((n, d))).astype(
        np.float32
    )


def anisotropic(n, d):
    """A large common mean and a few dominating directions, as language model embeddings have."""
    rng = np.random.default_rng(3)
    spread = np.ones(d)
    spread[:3] = 30, 15, 8
    return (500 + rng.standard_normal((n, d)) * spread).astype(np.float32)


def duplicated(n, d):
    return np.repeat(isotropic(n // 10 + 1, d), 10, axis=0)[np.random.default_rng(4).permutation(n)]


def lattice(n, d):
    """Small integers: exact ties everywhere."""
    return np.random.default_rng(5).integers(0, 3, (n, d)).astype(np.float32)


DATA = (isotropic, clustered, anisotropic, duplicated, lattice)


def sharded(vectors, num_shards, ids=None):
    ids = np.arange(len(vectors)) if ids is None else ids
    return LocalShards([CoresetShard(ids[i::num_shards], vectors[i::num_shards]) for i in range(num_shards)])


def reference(vectors, num_selected, *, first=None, centers=()):
    """Farthest-first in float64 on differences; ties go to the smallest id."""
    points = vectors.astype(np.float64)
    nearest = np.full(len(points), np.inf)
    for center in centers if first is None else [vectors[first]]:
        nearest = np.minimum(nearest, np.linalg.norm(points - center.astype(np.float64), axis=1))
    nearest[[] if first is None else [first]] = -np.inf
    picks = []
    while len(picks) < num_selected:
        pick = int(np.flatnonzero(nearest >= nearest.max() - 1e-9)[0])
        picks.append(pick)
        nearest = np.minimum(nearest, np.linalg.norm(points - points[pick], axis=1))
        nearest[pick] = -np.inf
    return picks


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("make", DATA)
def test_picks_are_the_float64_loops(make, num_shards):
    vectors = make(1500, 24)
    selection = k_center(sharded(vectors, num_shards), 120, candidate_batch=16)
    first = selection.ids[0]
    assert selection.ids == [first, *reference(vectors, 119, first=first)]


def test_float32_alone_would_pick_differently_on_anisotropic_data():
    """Otherwise the test above proves nothing about the float64 evaluation."""
    vectors = anisotropic(1500, 24)
    first = k_center(sharded(vectors, 1), 1).ids[0]
    norms = (vectors * vectors).sum(1)
    nearest, picks = np.full(len(vectors), np.inf, np.float32), [first]
    while len(picks) < 120:
        nearest = np.minimum(nearest, norms + norms[picks[-1]] - 2 * (vectors @ vectors[picks[-1]]))
        nearest[picks[-1]] = -np.inf
        picks.append(int(nearest.argmax()))
    assert picks != k_center(sharded(vectors, 1), 120).ids


@pytest.mark.parametrize("make", DATA)
@pytest.mark.parametrize("initial", [0, 5])
def test_shards_and_batches_change_nothing(make, initial):
    vectors = make(700, 16)
    centers = vectors[:initial] + np.float32(0.25) if initial else None
    shuffled = np.random.default_rng(0).permutation(len(vectors))
    picks = {
        tuple(k_center(shards, 90, candidate_batch=batch, initial_centers=centers, seed=3).ids)
        for batch in (1, 7, 64, 5000)
        for shards in (
            sharded(vectors, 1),
            sharded(vectors, 2),
            sharded(vectors, 4),
            sharded(vectors[shuffled], 3, shuffled),
        )
    }
    assert len(picks) == 1


def test_initial_centers_count_as_picked():
    vectors = clustered(600, 16)
    centers = vectors[::60]
    picks = reference(vectors, 50, centers=centers)
    assert k_center(sharded(vectors, 2), 50, initial_centers=centers).ids == picks


@pytest.mark.parametrize("make", DATA)
def test_radii_are_covering_radii(make):
    vectors = make(300, 8)
    selection = k_center(sharded(vectors, 2), 30)
    between = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors[None].astype(np.float64), axis=2)
    for i in (0, 1, 10, 29):
        assert selection.radii[i] == pytest.approx(between[:, selection.ids[: i + 1]].min(1).max(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_within_twice_the_optimum(seed):
    vectors = np.random.default_rng(seed).standard_normal((12, 2)).astype(np.float32)
    between = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    best = min(between[:, list(chosen)].min(1).max() for chosen in itertools.combinations(range(12), 4))
    assert k_center(sharded(vectors, 2), 4, seed=seed).radii[-1] <= 2 * best + 1e-6


@pytest.mark.parametrize("num_shards", [1, 3])
def test_fewer_distinct_points_than_picks(num_shards):
    vectors = np.repeat(isotropic(3, 8), 7, axis=0)
    selection = k_center(sharded(vectors, num_shards), 15, candidate_batch=2)
    assert len(set(selection.ids)) == 15
    assert len({tuple(vectors[i]) for i in selection.ids[:3]}) == 3
    assert selection.ids[3:] == sorted(selection.ids[3:])
    assert selection.radii[2:] == pytest.approx([0] * 13, abs=1e-6)


def test_everything_can_be_picked():
    selection = k_center(sharded(isotropic(20, 4), 4), 20)
    assert sorted(selection.ids) == list(range(20))
    assert selection.radii[-1] == 0


def test_seed_draws_only_the_first_pick():
    vectors = isotropic(200, 8)
    runs = [k_center(sharded(vectors, 1), 10, seed=seed).ids for seed in (0, 0, 1, 2)]
    assert runs[0] == runs[1]
    assert len({ids[0] for ids in runs}) > 1


def test_few_points_travel():
    """What shards hand out are candidates, never the matrix."""

    class Counting(LocalShards):
        sent = 0

        def broadcast(self, method, *arguments):
            answers = super().broadcast(method, *arguments)
            self.sent += len(pickle.dumps(answers))
            return answers

    vectors = isotropic(4000, 64)
    shards = Counting([CoresetShard(np.arange(4000), vectors)])
    k_center(shards, 40, candidate_batch=16)
    assert shards.sent < vectors.nbytes / 4


def test_bad_input_is_refused():
    vectors = isotropic(10, 4)
    with pytest.raises(ConfigError, match="between 1 and all 10 candidates, got 11"):
        k_center(sharded(vectors, 2), 11)
    with pytest.raises(ConfigError, match="got 0"):
        random_selection(np.arange(5), 0, Knowledge())
    vectors[3, 1] = np.nan
    with pytest.raises(DataError, match="finite"):
        k_center(sharded(vectors, 2), 2)
    with pytest.raises(ValueError, match="one row per id"):
        CoresetShard(np.arange(3), vectors)


def test_random_selection_is_seeded_and_ignores_order():
    ids = np.arange(100) * 7
    selection = random_selection(ids, 10, Knowledge(seed=1))
    assert len(set(selection.ids)) == 10
    assert set(selection.ids) <= set(ids.tolist())
    assert selection.radii == []
    assert selection == random_selection(ids[::-1], 10, Knowledge(seed=1))
    assert selection != random_selection(ids, 10, Knowledge(seed=2))


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.grows])
def test_a_larger_selection_goes_on_from_the_smaller_one(name):
    vectors = isotropic(200, 4)

    def chosen(num):
        pool = sharded(vectors, 2) if STRATEGIES[name].reads_vectors else np.arange(len(vectors))
        return STRATEGIES[name].choose(pool, num, Knowledge(seed=3)).ids

    assert chosen(60)[:25] == chosen(25)
