"""Micro-batches bounded by tokens, padding included, and cut so that little of a batch is padding."""

import math
from collections.abc import Sequence

import numpy as np

BATCH_COST = 256
"""Cost of one more forward pass, in tokens of padding: batches are split further only where that saves more."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
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
