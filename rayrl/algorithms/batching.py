"""Batches bounded by tokens, padding included, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np

BATCH_COST = 256
"""What one more forward pass costs, in tokens of padding: batches are split further only where that saves more."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split items into batches with (longest item) x (number of items) <= max_tokens.

    Every index appears once; an item longer than `max_tokens` gets a batch of its own. Items are sorted by length and
    cut into the contiguous batches that cost least, padded tokens plus `BATCH_COST` each (a dynamic programme over the
    cuts; ties in length go by index).
    """
    order = np.argsort(np.asarray(lengths, np.int64), kind="stable")
    ordered = np.asarray(lengths, np.int64)[order]
    best = [0]  # least cost of the first i items
    starts = []
    for stop in range(1, len(ordered) + 1):
        longest = max(int(ordered[stop - 1]), 1)
        widest = max(max_tokens // longest, 1)
        best_cost, start = min(
            (best[start] + BATCH_COST + longest * (stop - start), start) for start in range(max(stop - widest, 0), stop)
        )
        best.append(best_cost)
        starts.append(start)
    batches, stop = [], len(ordered)
    while stop:
        batches.append(order[starts[stop - 1] : stop].tolist())
        stop = starts[stop - 1]
    return batches[::-1]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens that is padding; 0 for no batches."""
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded if padded else 0.0
