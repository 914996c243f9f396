"""Tables as numbered Parquet parts, and memoised maps over them.

A table is a folder of parts; part i holds block i of the pool, one row per prompt. `map_blocks` runs a function over
the blocks with Ray Data and keeps each result as a part of another table; a part that is there is not computed again.
Resume, the second epoch of a streamed training and "never scored twice" are this one mechanism.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from rayrl.records import to_table
from rayrl.runs import storage
from rayrl.telemetry.progress import track

TASK_CPUS = 0.01
"""A block's task only waits for actors; what it reserves must not keep training workers from starting."""
MAX_TASKS = 1000
"""Tasks of one map; a larger table gives a task several blocks."""


@dataclass(frozen=True)
class BlockTable:
    """A folder of Parquet parts, one per block."""

    url: str
    num_blocks: int

    def part(self, block: int) -> str:
        return storage.join(self.url, f"part-{block:05d}.parquet")

    def has(self, block: int) -> bool:
        return storage.exists(self.part(block))

    def read(self, block: int) -> pa.Table:
        with fsspec.open(self.part(block), "rb") as file:
            return pq.read_table(io.BytesIO(file.read()))  # type: ignore[union-attr]

    def write(self, block: int, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(self.part(block), sink.getvalue())

    def blocks(self) -> Iterator[pa.Table]:
        """Every block in order; one in memory at a time."""
        for block in range(self.num_blocks):
            yield self.read(block)

    def memoised(self, block: int, compute: Callable[[int], pa.Table]) -> pa.Table:
        """The block, computed and kept if it is not there yet."""
        if not self.has(block):
            self.write(block, compute(block))
        return self.read(block)


def write_blocks(url: str, records: Iterable[Any], record: type, size: int) -> tuple[BlockTable, int]:
    """Records as a table of blocks of `size` rows, one block in memory at a time; the table and its number of rows."""
    rows, num_blocks, num_rows = iter(records), 0, 0
    while block := list(itertools.islice(rows, size)):
        BlockTable(url, num_blocks).write(num_blocks, to_table(block, record))
        num_blocks, num_rows = num_blocks + 1, num_rows + len(block)
    return BlockTable(url, num_blocks), num_rows


def stream_blocks(num_blocks: int, function: Callable[[int], pa.Table], *, concurrency: int) -> "ray.data.Dataset":
    """A lazy Ray Dataset of `function(block)` for every block, in block order, at most `concurrency` at once.

    Retries of a lost task are Ray's.
    """

    def of_batch(batch: Any) -> pa.Table:
        return pa.concat_tables([function(int(block)) for block in batch["item"]])

    blocks = ray.data.from_items(list(range(num_blocks)), override_num_blocks=min(num_blocks, MAX_TASKS) or None)
    blocks.context.execution_options.preserve_order = True
    return blocks.map_batches(
        of_batch, batch_size=1, num_cpus=TASK_CPUS, compute=ray.data.TaskPoolStrategy(concurrency)
    )


def map_blocks(
    table: BlockTable,
    compute: Callable[[int], pa.Table],
    *,
    concurrency: int,
    describe: Callable[[pa.Table], dict[str, Any]],
    progress: str,
) -> list[dict[str, Any]]:
    """Fill `table` block by block; the driver sees only `describe(block)`, a few counts, in block order.

    Args:
        table: the table to fill; blocks that are there are not computed again.
        compute: makes a block.
        concurrency: blocks in flight.
        describe: what the driver learns of a block.
        progress: label of the progress bar.
    """

    def count(block: int) -> pa.Table:
        return pa.Table.from_pylist([describe(table.memoised(block, compute))])

    counted = stream_blocks(table.num_blocks, count, concurrency=concurrency)
    return list(track(counted.iter_rows(), progress, total=table.num_blocks))
