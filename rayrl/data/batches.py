"""From a stream of rows to optimizer batches, the same ones after a restart.

Rows are shuffled within windows of batches by (seed, epoch, window): no barrier, bounded memory, and the order depends
on nothing but the stream's own order. In the first epoch the windows begin with one batch and double, so that training
starts with the first rows of a table that is still being made.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

Row = dict[str, Any]
WINDOW_BATCHES = 16
"""Batches per full shuffle window."""


def optimizer_batches(
    stream: Callable[[], Iterable[Row]], *, epochs: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[int, list[Row]]]:
    """Yield (epoch, rows) for every optimizer step of all epochs, without the first `skip` steps."""
    for epoch in range(epochs):
        for rows in _epoch(stream(), batch_size, seed, epoch):
            if skip > 0:
                skip -= 1
                continue
            yield epoch, rows


def _epoch(rows: Iterable[Row], batch_size: int, seed: int, epoch: int) -> Iterator[list[Row]]:
    remaining = iter(rows)
    window = 0
    while shuffled := list(islice(remaining, window_batches(epoch, window) * batch_size)):
        order = np.random.default_rng([seed, epoch, window]).permutation(len(shuffled))
        for start in range(0, len(order), batch_size):
            yield [shuffled[i] for i in order[start : start + batch_size]]
        window += 1


def window_batches(epoch: int, window: int) -> int:
    """Batches that a window shuffles together."""
    return min(2**window, WINDOW_BATCHES) if epoch == 0 else WINDOW_BATCHES
