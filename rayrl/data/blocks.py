"""Tables as numbered Parquet parts, and memoised maps over them.

A table is a folder of parts; part i holds block i of the pool, one row per prompt. `map_blocks` runs a function over
the blocks with Ray Data and keeps each result as a part of another table; a part that is there is not computed again.
Resume, the second epoch of a streamed training and "never scored twice" are this one mechanism.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from rayrl.metrics import meters
from rayrl.metrics.progress import track
from rayrl.records import to_table
from rayrl.runs import storage

TASK_CPUS = 0.01
"""A block's task only waits for actors; what it reserves must not keep training workers from starting."""
MAX_TASKS = 1000
"""Tasks of one map; a larger table gives a task several blocks."""
MIN_PROCESSES = 2
"""Tasks at once, each a process, that are not too many for any machine. A process costs seconds of CPU to start, one
after the other: on two cores the last of four began six seconds after the first.
"""
BLOCKS_PER_THREAD = 4
"""Of a task that works on several blocks at once: its last ones end with idle threads."""

COUNT_BYTES, TOLD = 64, 50
"""What a row of counts takes, about; and how often a task that makes many tells what it has: each time costs the driver
milliseconds.
"""


@dataclass(frozen=True)
class BlockTable:
    """A folder of Parquet parts, one per block."""

    url: str
    num_blocks: int

    @property
    def name(self) -> str:
        """What people call it: its stage's folder and its own, "generate/table"."""
        return "/".join(self.url.rstrip("/").split("/")[-2:])

    def part(self, block: int) -> str:
        return storage.join(self.url, f"part-{block:05d}.parquet")

    def has(self, block: int) -> bool:
        return storage.exists(self.part(block))

    def read(self, block: int) -> pa.Table:
        return pq.read_table(io.BytesIO(storage.read_bytes(self.part(block))))

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
        computed = not self.has(block)
        if computed:
            self.write(block, compute(block))
        rows = self.read(block)
        meters.BLOCKS.add(table=self.name, source="computed" if computed else "kept")
        meters.ROWS.add(rows.num_rows * computed, table=self.name)
        return rows


def write_blocks(url: str, records: Iterable[Any], record: type, size: int) -> tuple[BlockTable, int]:
    """Records as a table of blocks of `size` rows, one block in memory at a time; the table and its number of rows."""
    rows, num_blocks, num_rows = iter(records), 0, 0
    while block := list(itertools.islice(rows, size)):
        BlockTable(url, num_blocks).write(num_blocks, to_table(block, record))
        num_blocks, num_rows = num_blocks + 1, num_rows + len(block)
    return BlockTable(url, num_blocks), num_rows


def stream_blocks(
    num_blocks: int,
    function: Callable[[int], pa.Table],
    *,
    concurrency: int,
    name: str = "blocks",
    counts: bool = False,
) -> "ray.data.Dataset":
    """A lazy Ray Dataset of `function(block)` for every block, in block order, at most `concurrency` at once.

    A block mostly waits for actors, and a task is a process: where there are fewer CPUs than blocks to keep in flight,
    a task works on several of them in threads. Retries of a lost task are Ray's, whose dashboard shows the tasks as
    MapBatches(`name`).

    Args:
        num_blocks: how many there are.
        function: makes a block.
        concurrency: blocks in flight.
        name: of Ray's tasks.
        counts: a block comes to a row. They are told as they come, and such tasks have an equal share of all blocks: a
            task's last blocks leave threads idle, and of rows that somebody learns from none must pile up behind the
            first task's.
    """
    num_tasks = min(concurrency, max(MIN_PROCESSES, int(ray.cluster_resources().get("CPU", 0))))
    num_threads = -(-concurrency // num_tasks)
    num_rounds = 1 if counts else -(-num_blocks // (concurrency * BLOCKS_PER_THREAD))
    num_groups = max(1, min(num_blocks, MAX_TASKS, num_blocks if num_threads == 1 else num_tasks * num_rounds))

    def of_group(group: Any) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(num_threads) as threads:
            yield from threads.map(function, map(int, group["item"]))

    of_group.__name__ = name
    groups = ray.data.from_items(list(range(num_blocks)), override_num_blocks=num_groups if num_blocks else None)
    groups.context.execution_options.preserve_order = True
    if counts:
        groups.context.target_max_block_size = COUNT_BYTES * max(1, num_blocks // (num_groups * TOLD))
    at_once = ray.data.TaskPoolStrategy(min(num_tasks, num_groups))
    mapped = groups.map_batches(of_group, num_cpus=TASK_CPUS, compute=at_once)
    mapped.set_name(name)
    return mapped


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
        progress: label of the progress bar and of Ray's tasks.
    """

    def count(block: int) -> pa.Table:
        return pa.Table.from_pylist([describe(table.memoised(block, compute))])

    counted = stream_blocks(table.num_blocks, count, concurrency=concurrency, name=progress, counts=True)
    described = []
    for row in track(counted.iter_rows(), progress, total=table.num_blocks):
        described.append(row)
        meters.PROGRESS.set(len(described) / table.num_blocks, step=progress)
    return described
