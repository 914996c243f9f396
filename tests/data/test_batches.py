"""The order of training: every row once an epoch, drawn by the seed, the same after a restart and on any number of
ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pytest

from rayrl.config import SftConfig
from rayrl.data.batches import BUFFER_ROWS, deal, optimizer_batches, share
from rayrl.training.steps import num_steps

NUM_ROWS = 199
BUFFER = 64  # for the small tables here: 16 batches of 4


def tables(num_rows=NUM_ROWS, num_blocks=7):
    """A stream of numbered rows in blocks of about equal size."""
    bounds = np.linspace(0, num_rows, num_blocks + 1).astype(int)
    return lambda: (pa.table({"n": range(first, last)}) for first, last in pairwise(bounds))


def batches(stream=None, *, epochs=2, seed=0, skip=0, batch_size=4):
    drawn = optimizer_batches(
        stream or tables(), epochs=epochs, batch_size=batch_size, seed=seed, skip=skip, buffer_rows=BUFFER
    )
    return [(epoch, [row["n"] for row in batch]) for epoch, batch in drawn]


def test_every_row_once_per_epoch():
    for epoch in range(2):
        seen = [n for e, batch in batches() for n in batch if e == epoch]
        assert sorted(seen) == list(range(NUM_ROWS))


def test_only_the_last_batch_of_an_epoch_is_short():
    sizes = [len(batch) for epoch, batch in batches() if epoch == 0]
    assert set(sizes[:-1]) == {4}
    assert sizes[-1] == NUM_ROWS % 4


def test_the_order_does_not_depend_on_the_size_of_the_streams_tables():
    assert batches(tables(num_blocks=1)) == batches(tables(num_blocks=40)) == batches()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64, 500])
@pytest.mark.parametrize("num_blocks", [1, 7])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(num_blocks, batch_size):
    whole = [batch for _, batch in batches(tables(num_blocks=num_blocks), batch_size=batch_size)]
    assert len(whole) == num_steps(NUM_ROWS, SftConfig(epochs=2), batch_size)
    for num_ranks in (1, 2, 3, 8):
        for batch in whole:
            shares = [share(batch, rank, num_ranks) for rank in range(num_ranks)]
            assert list(chain(*shares)) == batch
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Ranks:
    """Ranks as threads, which meet in `scatter` as processes do."""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=30)

    def run(self, batches_of):
        """Deal the batches of every rank; its shares, by rank."""

        def one(rank):
            def scatter(parts):
                if parts is not None:
                    self._parts = parts
                self._barrier.wait()
                part = self._parts[rank]
                self._barrier.wait()  # the next list replaces this one when all have theirs
                return part

            return list(deal(batches_of(rank), rank, self.num_ranks, scatter))

        with ThreadPoolExecutor(self.num_ranks) as threads:
            return list(threads.map(one, range(self.num_ranks)))


@pytest.mark.parametrize("num_blocks", [1, 7])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_every_rank_is_dealt_its_share_of_every_step_and_one_rank_reads(num_ranks, num_blocks):
    whole = [batch for _, batch in batches(tables(num_blocks=num_blocks), batch_size=12, skip=5)]
    read_by = set()

    def batches_of(rank):
        for batch in whole:
            read_by.add(rank)
            yield batch

    by_rank = Ranks(num_ranks).run(batches_of)
    assert [list(chain(*shares)) for shares in zip(*by_rank, strict=True)] == whole
    assert read_by == {0}


@pytest.mark.parametrize("skip", [1, 17, NUM_ROWS // 4 + 1, NUM_ROWS // 4 + 2, 100])
def test_a_restart_continues_with_the_same_batches(skip):
    assert batches(skip=skip) == batches()[skip:]


def test_a_restart_after_the_end_has_nothing_left():
    assert batches(skip=len(batches())) == []


def test_order_depends_on_seed_and_epoch():
    first = [batch for epoch, batch in batches() if epoch == 0]
    second = [batch for epoch, batch in batches() if epoch == 1]
    assert first != second
    assert first == [batch for epoch, batch in batches() if epoch == 0]
    assert first != [batch for epoch, batch in batches(seed=1) if epoch == 0]


def test_a_row_is_drawn_from_a_bounded_number_of_the_next_rows():
    for epoch in range(2):
        drawn = [batch for e, batch in batches() if e == epoch]
        for step, batch in enumerate(drawn):
            # In the first epoch a step buffers one batch more than the one before.
            buffered = min(4 * (step + 1), BUFFER) if epoch == 0 else BUFFER
            assert max(batch) < 4 * step + buffered
        earliest = [max(batch) for batch in drawn[20:30]]
        assert max(earliest) > 4 * 25 + BUFFER / 2, "it is used"


def test_training_starts_with_the_first_table_of_a_stream():
    asked = []

    def stream():
        for first in range(0, NUM_ROWS, 4):
            asked.append(first)
            yield pa.table({"n": range(first, first + 4)})

    next(optimizer_batches(stream, epochs=1, batch_size=4, seed=0))
    assert asked == [0]


def test_no_rows_no_batches():
    assert batches(tables(0)) == []


def lag_1(values):
    values = np.asarray(values, float)
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])


@pytest.mark.parametrize("rows_per_block", [64, 512])
def test_a_table_sorted_by_source_is_mixed(rows_per_block):
    """64 blocks, in a drawn order as `stream_of` reads them: neighbours in the order of training say little."""
    order = np.random.default_rng(0).permutation(64)
    stream = lambda: (pa.table({"n": [int(block)] * rows_per_block}) for block in order)  # noqa: E731
    drawn = [
        (epoch, row["n"])
        for epoch, batch in optimizer_batches(stream, epochs=2, batch_size=64, seed=0)
        for row in batch
    ]
    assert rows_per_block <= BUFFER_ROWS / 16
    for epoch in range(2):
        # In the first epoch the buffer grows from one batch on; within a block it is 1.
        assert abs(lag_1([n for e, n in drawn if e == epoch])) < 0.1
