"""Micro-batches bounded by the tokens that are allocated: packed, or padded with little of a batch as padding."""

import math
from collections.abc import Sequence

import numpy as np

LOGIT_BYTES = 64 * 2**20
"""Logits that exist at a time while log-probabilities are computed, whatever the vocabulary, in float32."""

BATCH_COST = 256
"""Cost of one more forward pass, in tokens of padding: batches are split further only where that saves more."""


def micro_batches(samples: Sequence[Sequence[int]], max_tokens: int, *, is_packed: bool) -> list[list[int]]:
    """Split samples into batches that allocate at most `max_tokens` each; every index appears once.

    A sample that is longer on its own gets a batch of its own.

    Args:
        samples: lengths of each sample's sequences, which stay together; a pair has two.
        max_tokens: largest `allocated_tokens` of a batch.
        is_packed: whether sequences are read one behind the other, or as rows padded to the longest.
    """
    if is_packed:
        return packed_batches([allocated_tokens(sample, is_packed=True) for sample in samples], max_tokens)
    return padded_batches([allocated_tokens(sample, is_packed=False) for sample in samples], max_tokens)


def allocated_tokens(lengths: Sequence[int], *, is_packed: bool) -> int:
    """Count the tokens that a model computes for sequences of one forward pass, padding included."""
    return sum(lengths) if is_packed else max(lengths, default=0) * len(lengths)


def packed_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split items into few batches with (sum of the lengths) <= max_tokens: first fit, longest first, ties by index."""
    batches: list[list[int]] = []
    sizes: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (n for n, size in enumerate(sizes) if size + lengths[i] <= max_tokens)
        n = next(fitting, len(batches))
        if n == len(batches):
            batches.append([])
            sizes.append(0)
        batches[n].append(i)
        sizes[n] += lengths[i]
    return batches


def padded_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split items into batches with (longest item) x (number of items) <= max_tokens.

    Every index appears once; an item longer than `max_tokens` gets a batch of its own. Items are sorted by length, ties
    by index, and cut into the contiguous batches of least cost: padded tokens plus `BATCH_COST` for each batch.
    """
    unsorted = np.asarray(lengths, np.int64)
    order = np.argsort(unsorted, kind="stable")
    sorted_lengths = unsorted[order].tolist()

    # A dynamic programme over the cuts: `least_costs[n]` is the least cost of the n shortest items, and
    # `last_starts[n - 1]` the place where the last of their batches begins.
    least_costs: list[float] = [0]
    last_starts: list[int] = []
    for stop in range(1, len(sorted_lengths) + 1):
        # The last item of a batch is its longest, so that it alone decides how many items fit beside it.
        longest = max(sorted_lengths[stop - 1], 1)
        most_items = max(max_tokens // longest, 1)
        least_cost, last_start = math.inf, 0
        for start in range(max(stop - most_items, 0), stop):
            padded_tokens = longest * (stop - start)
            cost = least_costs[start] + BATCH_COST + padded_tokens
            if cost < least_cost:  # of equal costs the larger batch, that is the first, stays
                least_cost, last_start = cost, start
        least_costs.append(least_cost)
        last_starts.append(last_start)

    # Read the cuts back from the last batch to the first.
    batches: list[list[int]] = []
    stop = len(sorted_lengths)
    while stop:
        start = last_starts[stop - 1]
        batches.append(order[start:stop].tolist())
        stop = start
    return batches[::-1]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens that is padding; 0 for no batches."""
    num_padded = 0
    num_real = 0
    for batch in batches:
        num_padded += max(lengths[i] for i in batch) * len(batch)
        num_real += sum(lengths[i] for i in batch)
    return 1 - num_real / num_padded if num_padded else 0.0
