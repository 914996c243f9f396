"""The order of training: every row once an epoch, drawn by the seed, the same after a restart."""

from itertools import pairwise

import pytest

from rayrl.data.batches import WINDOW_BATCHES, optimizer_batches

NUM_ROWS = 3 * 4 * WINDOW_BATCHES + 7  # several windows of batches of 4, the last of each kind not full


def rows():
    return ({"n": n} for n in range(NUM_ROWS))


def batches(*, epochs=2, seed=0, skip=0):
    stream = optimizer_batches(rows, epochs=epochs, batch_size=4, seed=seed, skip=skip)
    return [(epoch, [row["n"] for row in batch]) for epoch, batch in stream]


def test_every_row_once_per_epoch():
    for epoch in range(2):
        seen = [n for e, batch in batches() for n in batch if e == epoch]
        assert sorted(seen) == list(range(NUM_ROWS))


def test_only_the_last_batch_of_an_epoch_is_short():
    sizes = [len(batch) for epoch, batch in batches() if epoch == 0]
    assert set(sizes[:-1]) == {4}
    assert sizes[-1] == NUM_ROWS % 4


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


def test_rows_are_shuffled_within_bounded_windows():
    for epoch, bounds in ((0, (0, 1, 3, 7, 15, 31)), (1, (0, 16, 32))):
        drawn = [n for e, batch in batches() for n in batch if e == epoch]
        for first, last in pairwise(bounds):
            window = range(4 * first, 4 * last)
            assert sorted(drawn[window.start : window.stop]) == list(window)
        assert drawn[: 4 * WINDOW_BATCHES] != list(range(4 * WINDOW_BATCHES))


def test_training_starts_with_the_first_rows_of_a_stream():
    asked = []

    def stream():
        for n in range(NUM_ROWS):
            asked.append(n)
            yield {"n": n}

    next(optimizer_batches(stream, epochs=1, batch_size=4, seed=0))
    assert asked == [0, 1, 2, 3]


def test_no_rows_no_batches():
    assert list(optimizer_batches(list, epochs=3, batch_size=4, seed=0)) == []
