"""Optimizer batches from a stream of rows: shuffled by a seed, and the same ones after a restart.

Rows are shuffled within windows of batches by (seed, epoch, window): no barrier, bounded memory, and the order depends
on nothing but the stream's own order. In the first epoch the windows begin with one batch and double, so that training
starts with the first rows of a table that is still being made.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")
WINDOW_BATCHES = 16
"""Batches per full shuffle window."""


def optimizer_batches(
    stream: Callable[[], Iterable[Row]], *, epochs: int, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[int, list[Row]]]:
    """Yield (epoch, rows) for every optimizer step of all epochs, without the first `skip` steps.

    `stream` is called once per epoch, and must yield the same rows in the same order each time.
    """
    for epoch in range(epochs):
        for rows in _epoch_batches(stream(), batch_size, seed, epoch):
            if skip > 0:
                skip -= 1
                continue
            yield epoch, rows


def _epoch_batches(rows: Iterable[Row], batch_size: int, seed: int, epoch: int) -> Iterator[list[Row]]:
    """Shuffle one window of rows after the other, and cut each into batches; only the last batch may be short."""
    remaining = iter(rows)
    window = 0
    while window_rows := list(islice(remaining, window_batches(epoch, window) * batch_size)):
        # A generator of its own for each window: skipped steps need no draws, and a restart finds the same order.
        order = np.random.default_rng([seed, epoch, window]).permutation(len(window_rows))
        for start in range(0, len(order), batch_size):
            yield [window_rows[i] for i in order[start : start + batch_size]]
        window += 1


def window_batches(epoch: int, window: int) -> int:
    """Count the batches that a window shuffles together."""
    return min(2**window, WINDOW_BATCHES) if epoch == 0 else WINDOW_BATCHES
