import itertools
import random

import pytest

from rayrl.algorithms.batching import (
    BATCH_COST,
    allocated_tokens,
    micro_batches,
    packed_batches,
    padded_batches,
    padding_share,
)


def padded(lengths, batches):
    return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)


@pytest.mark.parametrize("seed", range(5))
def test_every_item_once_and_within_the_limit(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 300) for _ in range(200)]
    batches = padded_batches(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 1000 for batch in batches)
    in_order = [list(range(i, min(i + 3, 200))) for i in range(0, 200, 3)]
    assert padding_share(lengths, batches) < 0.1 < padding_share(lengths, in_order)


def test_a_too_long_item_gets_its_own_batch():
    assert padded_batches([5, 50, 5], 10) == [[0, 2], [1]]


def test_edges():
    assert padded_batches([], 10) == []
    assert padding_share([], []) == 0.0
    assert padded_batches([0, 0], 10) == [[0, 1]]
    assert padding_share([2, 4], [[0, 1]]) == 0.25


@pytest.mark.parametrize("seed", range(20))
def test_least_padding_and_batches(seed):
    """Against every contiguous partition of the sorted lengths."""
    rng = random.Random(seed)
    lengths = sorted(rng.randint(1, 400) for _ in range(9))
    best = None
    for cuts in itertools.product([False, True], repeat=8):
        batches = [[0]]
        for i, cut in enumerate(cuts, start=1):
            batches = [*batches, [i]] if cut else [*batches[:-1], [*batches[-1], i]]
        if all(lengths[batch[-1]] * len(batch) <= 1500 for batch in batches):
            cost = BATCH_COST * len(batches) + padded(lengths, batches)
            best = cost if best is None else min(best, cost)
    batches = padded_batches(lengths, 1500)
    assert BATCH_COST * len(batches) + padded(lengths, batches) == best


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_no_batch_allocates_more_than_the_limit(is_packed, seed):
    rng = random.Random(seed)
    pairs = [[rng.randint(1, 250), rng.randint(1, 250)] for _ in range(100)]
    batches = micro_batches(pairs, 1000, is_packed=is_packed)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    allocated = [
        allocated_tokens([length for i in batch for length in pairs[i]], is_packed=is_packed) for batch in batches
    ]
    assert max(allocated) <= 1000
    if is_packed:  # few batches, and none of their tokens are padding
        assert sum(allocated) == sum(map(sum, pairs))
        assert len(batches) <= sum(allocated) // 1000 + 2


def test_packed_batches_are_filled_longest_first():
    assert packed_batches([2, 9, 5, 5, 1, 20], 10) == [[5], [1, 4], [2, 3], [0]]
    assert packed_batches([], 10) == []
