"""Tables of blocks: a block is computed once, order is kept, and half a part is no part."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rayrl.data.blocks import BlockTable, map_blocks, stream_blocks, write_blocks
from rayrl.records import Checkpoint, from_table

KILLED_WHILE_WRITING = """
import resource, signal, sys
import pyarrow as pa
from rayrl.data.blocks import BlockTable
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
BlockTable(sys.argv[1], 1).write(0, pa.table({"n": list(range(1000))}))
"""


def counting(folder):
    """A computation of blocks that leaves a file per call, from whatever process."""

    def compute(block):
        calls = Path(folder) / "calls"
        calls.mkdir(exist_ok=True)
        (calls / f"{block}-{len(list(calls.glob(f'{block}-*')))}").touch()
        return pa.table({"block": [block] * (block + 1)})

    return compute


def calls_in(folder):
    return sorted(path.name for path in (Path(folder) / "calls").glob("*"))


def describe(block):
    return {"num_rows": block.num_rows}


def test_memoised_computes_once(tmp_path):
    table = BlockTable(str(tmp_path / "table"), 2)
    compute = counting(tmp_path)
    assert not table.has(1)
    assert table.memoised(1, compute) == table.memoised(1, compute)
    assert calls_in(tmp_path) == ["1-0"]
    assert table.has(1)
    assert not table.has(0)


def test_map_blocks_fills_what_is_missing_and_counts_all_in_order(ray_cluster, tmp_path):
    table = BlockTable(str(tmp_path / "table"), 9)
    compute = counting(tmp_path)
    table.memoised(4, compute)
    expected = [{"num_rows": block + 1} for block in range(9)]
    for _ in range(2):
        assert map_blocks(table, compute, concurrency=3, describe=describe, progress="test") == expected
    assert calls_in(tmp_path) == [f"{block}-0" for block in range(9)]
    assert [part["block"][0].as_py() for part in table.blocks()] == list(range(9))


def test_a_stream_keeps_the_order_of_blocks(ray_cluster):
    def late_first(block):
        import time

        time.sleep(0.5 if block == 0 else 0)
        return pa.table({"block": [block]})

    from ray.data import DataContext

    context = DataContext.get_current()
    before, context.execution_options.preserve_order = context.execution_options.preserve_order, True
    try:
        rows = list(stream_blocks(6, late_first, concurrency=4).iter_rows())
    finally:
        context.execution_options.preserve_order = before
    assert [row["block"] for row in rows] == list(range(6))


def waiting(block):
    import os
    import time

    began = time.time()
    time.sleep(0.3)
    return pa.table({"block": [block], "pid": [os.getpid()], "began": [began], "ended": [time.time()]})


def test_more_blocks_than_cpus_are_in_flight_in_few_processes(ray_cluster):
    rows = list(stream_blocks(50, waiting, concurrency=12).iter_rows())
    assert [row["block"] for row in rows] == list(range(50))
    at_once = [[r for r in rows if r["began"] <= row["began"] < r["ended"]] for row in rows]
    assert 4 < max(map(len, at_once)) <= 12
    assert max(len({r["pid"] for r in running}) for running in at_once) <= 4


def test_counts_are_told_before_their_task_ends(ray_cluster):
    import time

    told = [(row, time.time()) for row in stream_blocks(96, waiting, concurrency=12, counts=True).iter_rows()]
    assert [row["block"] for row, _ in told] == list(range(96))
    first, told_at = told[0]
    of_its_task = [row["ended"] for row, _ in told if row["pid"] == first["pid"]]
    assert len(of_its_task) == 24 and told_at < max(of_its_task) - 0.6


def test_a_block_that_fails_among_others_is_heard_of(ray_cluster):
    def failing(block):
        if block == 7:
            raise ValueError("block 7 is broken")
        return pa.table({"block": [block]})

    with pytest.raises(Exception, match="block 7 is broken"):
        list(stream_blocks(20, failing, concurrency=12).iter_rows())


def test_map_blocks_of_an_empty_table(ray_cluster, tmp_path):
    table = BlockTable(str(tmp_path / "table"), 0)
    assert map_blocks(table, counting(tmp_path), concurrency=2, describe=describe, progress="test") == []


def test_a_block_without_rows_is_a_block(tmp_path):
    schema = pa.schema([pa.field("ids", pa.list_(pa.int64()), nullable=False)])
    table = BlockTable(str(tmp_path / "table"), 1)
    table.write(0, schema.empty_table())
    assert table.has(0)
    assert table.read(0).num_rows == 0
    assert table.read(0).schema.names == ["ids"]


def test_a_writer_killed_half_way_leaves_no_part(tmp_path):
    table = BlockTable(str(tmp_path / "table"), 1)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, table.url], check=False)
    assert killed.returncode < 0
    (torn,) = (tmp_path / "table").iterdir()
    assert 0 < torn.stat().st_size <= 300
    assert not table.has(0)
    assert table.memoised(0, counting(tmp_path)).num_rows == 1
    assert calls_in(tmp_path) == ["0-0"]


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_tables_live_on_any_filesystem(tmp_path, scheme):
    table = BlockTable(f"{scheme}{tmp_path}/table", 1)
    table.write(0, pa.table({"n": [1, 2]}))
    assert table.has(0)
    assert table.read(0)["n"].to_pylist() == [1, 2]


def test_records_become_blocks_of_a_size_one_at_a_time(tmp_path):
    written = []

    def records():
        for i in range(5):
            written.append(len(list(tmp_path.glob("part-*"))))
            yield Checkpoint(path=str(i), version="v")

    table, num_rows = write_blocks(str(tmp_path), records(), Checkpoint, 2)
    assert (table, num_rows) == (BlockTable(str(tmp_path), 3), 5)
    assert [record.path for block in table.blocks() for record in from_table(block, Checkpoint)] == list("01234")
    assert written == [0, 0, 1, 1, 2]
    assert write_blocks(str(tmp_path), [], Checkpoint, 2) == (BlockTable(str(tmp_path), 0), 0)
