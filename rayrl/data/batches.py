"""Optimizer batches from a stream of rows: shuffled by a seed, the same after a restart, dealt to any number of ranks.

A batch is of the whole training, whatever the number of its workers: one process draws the batches, and every rank
takes its share of each. The number of steps, the rows of a step and the learning rate are therefore those of one rank.

Every batch is drawn from a buffer of the next `BUFFER_ROWS` rows, several blocks, by (seed, epoch): no barrier, bounded
memory, and the order depends on nothing but the stream's own order. Together with a drawn order of the blocks it mixes
the sources of a table that is sorted by source. In the first epoch the buffer begins with one batch and grows by one a
step, so that training starts with the first rows of a table that is still being made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")
BUFFER_ROWS = 8192
"""Rows from which a batch is drawn: 16 blocks of the seed data, 128 of a pool. A buffer of G blocks, in a drawn order,
leaves the rows of a table that is sorted by source a correlation of about 1 / G."""


class ArrowRow(NamedTuple):
    """One row of an Arrow table. It becomes Python's lists, of five times its size, when its batch is due."""

    table: pa.Table
    row: int

    def read(self) -> dict[str, Any]:
        return self.table.slice(self.row, 1).to_pylist()[0]


def optimizer_batches(
    tables: Callable[[], Iterable[pa.Table]],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    skip: int = 0,
    buffer_rows: int = BUFFER_ROWS,
) -> Iterator[tuple[int, list[Any]]]:
    """Yield (epoch, rows) for every optimizer step of all epochs, without the first `skip` steps.

    `tables` is called once per epoch, and must yield the same rows in the same order each time, in tables of any size.
    """
    for epoch in range(epochs):
        for batch in _epoch_batches(_rows_of(tables()), batch_size, seed, epoch, buffer_rows):
            if skip > 0:
                skip -= 1
                continue
            yield epoch, [row.read() for row in batch]


def share(batch: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return a rank's part of a batch. The parts of all ranks, joined, are the batch; no two differ by more than one.

    A rank may have none: a batch may be smaller than the number of ranks.
    """
    return batch[len(batch) * rank // world_size : len(batch) * (rank + 1) // world_size]


def deal(
    batches: Iterator[Sequence[T]],
    rank: int,
    world_size: int,
    scatter: Callable[[list[Sequence[T] | None] | None], Sequence[T] | None],
) -> Iterator[list[T]]:
    """Yield a rank's share of every batch. Rank 0 alone asks for the batches, so that rows are read and made once.

    Args:
        batches: on rank 0, of all ranks; on the others nothing asks for them.
        rank: this one.
        world_size: number of ranks, all of which call this.
        scatter: sends every rank its part of rank 0's list; the others give None. A part that is None is the end.
    """
    while True:
        shares: list[Sequence[T] | None] | None = None
        if rank == 0:
            batch = next(batches, None)
            shares = [None if batch is None else share(batch, other, world_size) for other in range(world_size)]
        own = scatter(shares)
        if own is None:
            return
        yield list(own)


def _rows_of(tables: Iterable[pa.Table]) -> Iterator[ArrowRow]:
    for table in tables:
        # A copy: the table itself may lie in Ray's object store, which cannot spill it as long as a row is buffered.
        own = table.take(pa.array(range(table.num_rows), pa.int64()))
        for index in range(own.num_rows):
            yield ArrowRow(own, index)


def _epoch_batches(
    rows: Iterator[ArrowRow], batch_size: int, seed: int, epoch: int, buffer_rows: int
) -> Iterator[list[ArrowRow]]:
    """Draw every batch from a buffer of the next rows; only the last batch may be short."""
    rng = np.random.default_rng([seed, epoch])
    buffer: list[ArrowRow] = []
    size = batch_size if epoch == 0 else max(buffer_rows, batch_size)
    while True:
        buffer += islice(rows, size - len(buffer))
        if not buffer:
            return
        batch: list[ArrowRow] = []
        for _ in range(min(batch_size, len(buffer))):
            drawn = int(rng.integers(len(buffer)))
            # The last row takes the place of the drawn one.
            buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
            batch.append(buffer.pop())
        yield batch
        size = min(size + batch_size, max(buffer_rows, batch_size))
