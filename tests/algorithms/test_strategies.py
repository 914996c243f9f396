"""Every strategy against the plain loop over its equation, or a case computed by hand."""

import pickle

import numpy as np
import pytest

from rayrl.algorithms.heads import Heads
from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards
from rayrl.algorithms.selection.by_heads import label_information
from rayrl.algorithms.selection.pairs import Differences, optimistic_gaps, preference_information
from rayrl.algorithms.selection.shards import uniform_of
from rayrl.errors import ConfigError

STRIDE = 8


def points(n, d, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((6, d))
    return (3 + centers[rng.integers(0, 6, n)] + 0.3 * rng.standard_normal((n, d))).astype(np.float32)


def sharded(vectors, num_shards=1, ids=None):
    ids = np.arange(len(vectors)) if ids is None else np.asarray(ids)
    return LocalShards([CoresetShard(ids[i::num_shards], vectors[i::num_shards]) for i in range(num_shards)])


def by_prompts(vectors, num_shards, per_prompt=4):
    """Shards that own whole prompts, as blocks do."""
    ids = np.arange(len(vectors)) // per_prompt * STRIDE + np.arange(len(vectors)) % per_prompt
    owner = ids // STRIDE % num_shards
    return LocalShards([CoresetShard(ids[owner == i], vectors[owner == i]) for i in range(num_shards)])


def some_heads(d, seed=0):
    rng = np.random.default_rng(seed)
    return Heads(
        weights=rng.standard_normal((d, 5)).astype(np.float32), bias=rng.standard_normal(5), noise=0.5, ridge=2.0
    )


def choose(name, pool, num, **knowledge):
    return STRATEGIES[name].choose(pool, num, Knowledge(**knowledge)).ids


VECTOR_STRATEGIES = [name for name, strategy in STRATEGIES.items() if strategy.reads_vectors]


@pytest.mark.parametrize("name", VECTOR_STRATEGIES)
def test_shards_and_batches_of_candidates_change_no_pick(name):
    vectors, heads = points(600, 12), some_heads(12)
    vectors[40:60] = vectors[20:40]  # exact ties
    picks = set()
    for num_shards, batch in ((1, 256), (2, 5), (3, 64)):
        pool = by_prompts(vectors, num_shards)
        picks.add(tuple(choose(name, pool, 40, heads=heads, prompt_stride=STRIDE, candidate_batch=batch, seed=4)))
        # Again on shards that were used before: nothing of the last selection is left.
        picks.add(tuple(choose(name, pool, 40, heads=heads, prompt_stride=STRIDE, candidate_batch=batch, seed=4)))
    assert len(picks) == 1
    (ids,) = picks
    num = 40 if STRATEGIES[name].asks == "responses" else 80
    assert len(set(ids)) == num


@pytest.mark.parametrize("name", [name for name in VECTOR_STRATEGIES if STRATEGIES[name].reads_heads])
def test_ties_of_wide_vectors_are_ties_in_shards_of_any_size(name):
    """The last digits of a float32 product would depend on the size of the shard."""
    vectors = np.repeat(points(300, 384), 4, axis=0)[np.random.default_rng(0).permutation(1200)]
    ids = np.arange(1200) // 4 * STRIDE + np.arange(1200) % 4
    heads = some_heads(384)
    uneven = LocalShards(
        [CoresetShard(ids[rows], vectors[rows]) for rows in (slice(0, 1048), slice(1048, 1124), slice(1124, 1200))]
    )
    settings = {"heads": heads, "prompt_stride": STRIDE, "seed": 4}
    one = choose(name, LocalShards([CoresetShard(ids, vectors)]), 101, **settings)
    assert one == choose(name, uneven, 101, **settings)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_taken_is_not_picked_again_and_all_that_is_left_can_be(name):
    vectors, heads = points(48, 6), some_heads(6)
    shards = by_prompts(vectors, 2)
    ids = np.sort(np.concatenate([shard.ids for shard in shards.shards]))
    strategy = STRATEGIES[name]
    pool = shards if strategy.reads_vectors else ids
    taken = ids[:16]
    settings = {"taken": taken, "heads": heads, "entropies": np.linspace(1, 0, 48), "prompt_stride": STRIDE}
    picks = choose(name, pool, 32 if strategy.asks == "responses" else 8, **settings)
    if strategy.asks == "responses":
        assert sorted(picks) == ids[16:].tolist()
    else:
        pairs = np.array(picks).reshape(8, 2)
        assert sorted(set((pairs // STRIDE).ravel())) == list(range(4, 12))
        assert (pairs[:, 0] // STRIDE == pairs[:, 1] // STRIDE).all() and (pairs[:, 0] != pairs[:, 1]).all()
    with pytest.raises(ConfigError, match=r"select\.budget must pick between 1 and all"):
        choose(name, pool, 33, **settings)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_travel_to_other_processes(name):
    assert pickle.loads(pickle.dumps(STRATEGIES[name])).choose is STRATEGIES[name].choose


def test_d_optimal_is_the_loop_over_determinants():
    vectors = points(120, 6)
    x = vectors.astype(np.float64) - vectors.astype(np.float64).mean(0)
    v = 2.0 * np.eye(6) + np.outer(x[7], x[7])
    expected = []
    for _ in range(30):
        gains = np.array([np.linalg.slogdet(v + np.outer(row, row))[1] for row in x])
        gains[[7, *expected]] = -np.inf
        expected.append(int(gains.argmax()))
        v += np.outer(x[expected[-1]], x[expected[-1]])
    heads = some_heads(6)
    shards = sharded(vectors, 2)
    # The pool's mean is rounded, which this objective sees: the loop gets the shards' vectors.
    picks = choose("d_optimal", shards, 30, heads=heads, taken=np.array([7]))
    centred = np.empty_like(x)
    for shard in shards.shards:
        centred[shard.ids] = shard.vectors
    assert np.abs(centred - x).max() < 0.02
    assert picks[:10] == expected[:10]


def test_facility_location_is_the_loop_over_its_sum():
    vectors = points(150, 5)
    shards = sharded(vectors, 3)
    picks = choose("facility_location", shards, 25, taken=np.array([3]))
    x = np.empty(vectors.shape)
    for shard in shards.shards:
        x[shard.ids] = shard.vectors
    squared = ((x[:, None] - x[None]) ** 2).sum(2)
    nearest = np.minimum((x**2).sum(1), squared[3])
    expected = []
    for _ in range(25):
        gains = np.maximum(nearest[None] - squared, 0).sum(1)
        gains[[3, *expected]] = -np.inf
        expected.append(int(gains.argmax()))
        nearest = np.minimum(nearest, squared[expected[-1]])
    assert picks == expected


def test_facility_location_of_a_large_pool_covers_a_sample(monkeypatch):
    monkeypatch.setattr("rayrl.algorithms.selection.greedy.MIN_CLIENTS", 40)
    vectors = points(400, 5)
    assert len(set(choose("facility_location", sharded(vectors, 2), 10))) == 10


def test_k_means_pp_draws_by_squared_distance():
    """From 0, the points 1, 2 and 3 are drawn as 1 : 4 : 9."""
    vectors = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    shards = sharded(vectors, 2)
    num = 3000
    drawn = [choose("k_means_pp", shards, 1, taken=np.array([0]), seed=seed)[0] for seed in range(num)]
    shares = np.bincount(drawn, minlength=4) / num
    error = 4 * np.sqrt(np.array([1, 4, 9]) / 14 * (1 - np.array([1, 4, 9]) / 14) / num)
    assert (np.abs(shares[1:] - np.array([1, 4, 9]) / 14) < error).all() and shares[0] == 0


def test_many_draws_of_k_means_pp_at_a_time_have_the_distribution_of_one_at_a_time():
    """The second of two draws after 0: P(1, 2) and so on, from D^2 by hand; clocks are thinned within the batch."""
    vectors = np.array([[0.0], [1.0], [2.0], [4.0]], np.float32)
    shards = sharded(vectors, 1)
    num = 4000
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(num):
        pair = tuple(choose("k_means_pp", shards, 2, taken=np.array([0]), seed=seed))
        counts[pair] = counts.get(pair, 0) + 1
    # First 1, 4, 16 of 21. After 3 (at 4): min(1, 9) = 1 and min(4, 4) = 4. After 2 (at 2): 1 and 4. After 1: 1 and 9.
    expected = {
        (3, 1): 16 / 21 * 1 / 5,
        (3, 2): 16 / 21 * 4 / 5,
        (2, 1): 4 / 21 * 1 / 5,
        (2, 3): 4 / 21 * 4 / 5,
        (1, 2): 1 / 21 * 1 / 10,
        (1, 3): 1 / 21 * 9 / 10,
    }
    for pair, share in expected.items():
        assert abs(counts.get(pair, 0) / num - share) < 4 * np.sqrt(share * (1 - share) / num), pair


def test_k_means_pp_goes_on_where_only_copies_are_left():
    vectors = np.repeat(points(3, 4), 5, axis=0)
    picks = choose("k_means_pp", sharded(vectors, 2), 15)
    assert sorted(picks) == list(range(15)) and len({pick // 5 for pick in picks[:3]}) == 3


def line_heads():
    """Two heads on one coordinate: x and -x; they agree at 0 and disagree in proportion to |x|."""
    return Heads(weights=np.array([[1.0, -1.0]], np.float32), bias=np.zeros(2), noise=1.0, ridge=1.0)


def test_uncertainty_is_the_spread_of_the_heads():
    vectors = np.array([[0.1], [-3.0], [2.0], [0.0]], np.float32)
    assert choose("uncertainty", sharded(vectors, 2), 3, heads=line_heads()) == [1, 2, 0]


def test_entropy_asks_about_the_least_sure_scores_and_abstentions_come_last():
    ids, entropies = np.array([9, 3, 7, 1, 5]), np.array([0.2, np.nan, 1.5, 1.5 + 1e-12, np.nan])  # by rising id
    picks = choose("entropy", ids, 5, entropies=entropies)
    assert picks[:3] == [5, 7, 1], "equal entropies go by id"
    assert sorted(picks[3:]) == [3, 9]
    assert choose("entropy", ids[::-1], 5, entropies=entropies) == picks
    assert choose("entropy", ids, 2, entropies=entropies, taken=np.array([5])) == [7, 1]
    drawn = {choose("entropy", ids, 4, entropies=entropies, seed=seed)[3] for seed in range(20)}
    assert drawn == {3, 9}, "which abstention comes first is drawn"
    assert len(choose("entropy", ids, 5, entropies=np.full(5, np.nan))) == 5


def test_badge_draws_what_is_uncertain_and_far():
    """Embeddings spread(x) x: in proportion to x |x|, so to the point 0 that is taken the weights are x^4."""
    vectors = np.array([[0.0], [1.0], [-2.0]], np.float32)
    pool = sharded(vectors, 1)
    mean = pool.shards[0].vectors.mean()
    drawn = [choose("badge", pool, 1, heads=line_heads(), taken=np.array([0]), seed=seed)[0] for seed in range(400)]
    assert mean < 0 and drawn.count(2) > 300


def test_margin_asks_about_the_best_two_that_are_closest():
    """Heads of one coordinate. Prompt 0: 3.0 and 2.0; prompt 1: 5.0 and 4.9; prompt 2 has one response."""
    vectors = np.array([[1.0], [3.0], [2.0], [5.0], [4.9], [0.0], [9.0]], np.float32)
    ids = np.array([0, 1, 2, STRIDE, STRIDE + 1, STRIDE + 2, 2 * STRIDE])
    heads = Heads(weights=np.ones((1, 2), np.float32), bias=np.zeros(2), noise=1.0, ridge=1.0)
    pool = LocalShards([CoresetShard(ids[:3], vectors[:3]), CoresetShard(ids[3:], vectors[3:])])
    assert choose("margin", pool, 4, heads=heads, prompt_stride=STRIDE) == [STRIDE, STRIDE + 1, 1, 2]


def test_bald_prefers_two_camps_to_an_even_spread_and_is_at_most_log_m():
    """Two camps far apart: log 2 nats; four heads far apart: log 4; heads that agree: none."""
    camps = np.array([[0.0, 0.0, 100.0, 100.0], [0.0, 100.0, 200.0, 300.0], [1.0, 1.0, 1.0, 1.0]])
    assert label_information(camps, 1.0) == pytest.approx([np.log(2), np.log(4), 0], abs=0.02)
    near = label_information(np.array([[-1.0, 1.0], [-2.0, 2.0]]), 1.0)
    assert 0 < near[0] < near[1] < np.log(2)


def test_k_center_uncertain_covers_only_the_uncertain():
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1, 1, (400, 1)).astype(np.float32)
    pool = sharded(vectors, 2)
    picks = choose("k_center_uncertain", pool, 20, heads=line_heads())
    centred = np.abs(vectors[:, 0])
    assert centred[picks].min() >= np.sort(centred)[-100] - 1e-6
    assert (vectors[picks] > 0).any() and (vectors[picks] < 0).any()


def test_weighted_coverage_covers_what_the_heads_disagree_about():
    """Two equal clusters: the heads agree in the first, so the first pick is in the second."""
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 0.1, (50, 2)), rng.normal([0, 5], 0.1, (50, 2))]).astype(np.float32)
    heads = Heads(weights=np.array([[0, 0], [1.0, -1.0]], np.float32), bias=np.zeros(2), noise=1.0, ridge=1.0)
    assert choose("weighted_coverage", sharded(vectors, 2), 1, heads=heads)[0] >= 50


def test_one_response_of_every_prompt_is_drawn_before_a_second():
    ids = np.array([prompt * STRIDE + i for prompt in range(10) for i in range(3)])
    picks = choose("random_by_prompt", ids, 20, prompt_stride=STRIDE, seed=3)
    assert sorted(np.array(picks[:10]) // STRIDE) == sorted(np.array(picks[10:]) // STRIDE) == list(range(10))
    # Prompts that were asked about wait: the next ten are of the others first.
    taken = np.array([0, 1, STRIDE])
    picks = choose("random_by_prompt", ids, 8, prompt_stride=STRIDE, taken=taken)
    assert sorted(np.array(picks) // STRIDE) == list(range(2, 10))
    assert picks[:5] == choose("random_by_prompt", ids, 5, prompt_stride=STRIDE, taken=taken)


def pair_pool():
    """Three prompts of three responses, heads x and x / 2 + bias: scores by hand."""
    vectors = np.array([[0], [1], [4], [0], [0.2], [0.1], [0], [2], [2.5]], np.float32)
    ids = np.array([prompt * STRIDE + i for prompt in range(3) for i in range(3)])
    heads = Heads(weights=np.array([[1.0, 0.5]], np.float32), bias=np.array([0.0, 3.0]), noise=1.0, ridge=1.0)
    return LocalShards([CoresetShard(ids[:3], vectors[:3]), CoresetShard(ids[3:], vectors[3:])]), heads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pair_margin_large", [2, 0, 2 * STRIDE + 2, 2 * STRIDE]),
        ("pair_margin_small", [STRIDE + 1, STRIDE + 2, 2 * STRIDE + 2, 2 * STRIDE + 1]),
        ("delta_ucb", [2, 0, 2 * STRIDE + 2, 2 * STRIDE]),
    ],
)
def test_pairs_by_their_margins(name, expected):
    pool, heads = pair_pool()
    picks = choose(name, pool, 2, heads=heads, prompt_stride=STRIDE)
    if name == "pair_margin_small":  # 0.1 against 0.0 ties with 0.2 against 0.1: the smaller first id
        assert picks[0] // STRIDE == 1 and picks[2:] == expected[2:]
    else:
        assert picks == expected


def test_optimism_adds_the_spread_of_the_gap():
    gaps = optimistic_gaps(np.array([[1.0, 1.0], [-1.0, 2.0]]))
    assert gaps == pytest.approx([1.0, 0.5 + np.sqrt(4.5)])


def test_a_preference_tells_most_where_the_heads_are_sure_of_opposites():
    information = preference_information(np.array([[50.0, -50.0], [0.0, 0.0], [1.0, 1.0], [2.0, -2.0]]))
    assert information[:3] == pytest.approx([np.log(2), 0, 0], abs=1e-6) and 0 < information[3] < np.log(2)


def test_double_thompson_pairs_the_bests_of_two_heads():
    """Two heads with opposite tastes: the pair is of the largest and the smallest, or of one head's best two."""
    vectors = np.array([[0.0], [1.0], [2.0]] * 40, np.float32)
    ids = np.array([prompt * STRIDE + i for prompt in range(40) for i in range(3)])
    pool = LocalShards([CoresetShard(ids, vectors)])
    pairs = np.array(choose("double_thompson", pool, 40, heads=line_heads(), prompt_stride=STRIDE)).reshape(-1, 2)
    kinds = {tuple(pair % STRIDE) for pair in pairs}
    assert kinds == {(2, 0), (0, 2), (2, 1), (0, 1)}
    assert sorted(pairs[:, 0] // STRIDE) == list(range(40))


def test_pair_d_optimal_is_the_loop_over_differences():
    vectors = points(60, 5)
    pool = by_prompts(vectors, 2)
    heads = some_heads(5)
    pairs = np.array(choose("pair_d_optimal", pool, 12, heads=heads, prompt_stride=STRIDE)).reshape(-1, 2)
    x = {}
    for shard in pool.shards:
        x |= dict(zip(shard.ids.tolist(), shard.vectors.astype(np.float64), strict=True))
    v = 4 * heads.ridge * np.eye(5)
    done: list[int] = []
    for first, second in pairs:
        gains = {
            (a, b): (x[a] - x[b]) @ np.linalg.solve(v, x[a] - x[b])
            for a in x
            for b in x
            if a < b and a // STRIDE == b // STRIDE and a // STRIDE not in done
        }
        assert max(gains, key=lambda pair: gains[pair]) == (min(first, second), max(first, second))
        v += np.outer(x[first] - x[second], x[first] - x[second])
        done.append(first // STRIDE)


def test_differences_of_pairs_are_not_held():
    """At 1,000,000 x 384 with 6 responses a prompt they would take 3.6 GiB beside the vectors' 1.4."""
    vectors = points(240, 384)
    (shard,) = by_prompts(vectors, 1, per_prompt=6).shards
    differences = Differences(shard, STRIDE, np.empty(0, np.int64))
    assert len(differences.ids) == 40 * 15
    held = sum(array.nbytes for array in vars(differences).values() if isinstance(array, np.ndarray))
    assert held <= 32 * len(differences.ids) < vectors.nbytes
    made = {identifier: row for row, identifier in enumerate(differences.ids.tolist())}
    rows = [made[(5 * STRIDE + 1) * STRIDE + 4], made[2 * STRIDE**2 + 3]]
    assert np.array_equal(differences.vectors_at(np.array(rows)), vectors[[31, 12]] - vectors[[34, 15]])
    assert np.allclose(differences.norms[rows], ((vectors[[31, 12]] - vectors[[34, 15]]) ** 2).sum(1))


def test_draws_by_ids_are_uniform_and_independent():
    ids = np.arange(20000)
    a, b = uniform_of(ids, 1, 2), uniform_of(ids, 1, 3)
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.var() - 1 / 12) < 0.003 and abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert np.array_equal(uniform_of(ids[::-1], 1, 2), a[::-1])
