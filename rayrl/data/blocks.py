"""Tables as numbered Parquet parts, and memoised maps over them.

A table is a folder of parts; part i holds block i of the pool, one row per prompt. `map_blocks` runs a function over
the blocks with Ray Data and keeps each result as a part of another table; a part that exists is not computed again.
Resume, the second epoch of a streamed training and "never scored twice" are this one mechanism.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from rayrl.metrics import meters
from rayrl.metrics.progress import track
from rayrl.records import R, to_table
from rayrl.runs import storage

Counts = TypeVar("Counts", bound=Mapping[str, object])

TASK_CPUS = 0.01
"""CPUs that a task reserves: it only waits for actors, and must not keep training workers from starting."""
MAX_TASKS = 1000
"""Tasks of one map; a larger table gives a task several blocks."""
MIN_PROCESSES = 2
"""Tasks at once, each a process, that are not too many for any machine. Processes start one after the other, and each
takes seconds of CPU: on two cores the last of four began six seconds after the first."""
BLOCKS_PER_THREAD = 4
"""Blocks per thread of a task that works on several blocks at once: its last blocks leave threads idle."""
COUNT_BYTES = 64
"""Approximate size of a row of counts."""
REPORTS_PER_TASK = 50
"""Number of times that a task hands over the counts of its blocks: each time costs the driver milliseconds."""


@dataclass(frozen=True)
class BlockTable:
    """A folder of Parquet parts, one per block."""

    url: str
    num_blocks: int

    @property
    def name(self) -> str:
        """Name for people: the stage's folder and the table's own, "generate/table"."""
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
        """Yield every block in order; one is in memory at a time."""
        for block in range(self.num_blocks):
            yield self.read(block)

    def memoised(self, block: int, compute: Callable[[int], pa.Table]) -> pa.Table:
        """Read the block; compute and keep it first if it does not exist yet."""
        is_kept = self.has(block)
        if not is_kept:
            self.write(block, compute(block))
        # A new block is read back as well: a table is the same whether it was computed now or earlier.
        rows = self.read(block)
        meters.BLOCKS.add(table=self.name, source="kept" if is_kept else "computed")
        meters.ROWS.add(0 if is_kept else rows.num_rows, table=self.name)
        return rows


def found_table(url: str) -> BlockTable:
    """Return the table that lies in a folder, of as many blocks as it has parts there."""
    parts = [name for name in storage.children(url) if name.startswith("part-") and name.endswith(".parquet")]
    return BlockTable(url, len(parts))


def write_blocks(url: str, records: Iterable[R], record: type[R], size: int) -> tuple[BlockTable, int]:
    """Write records as a table of blocks of `size` rows, one block in memory at a time.

    Returns:
        The table, and its number of rows.
    """
    remaining = iter(records)
    num_blocks = 0
    num_rows = 0
    while block := list(itertools.islice(remaining, size)):
        BlockTable(url, num_blocks).write(num_blocks, to_table(block, record))
        num_blocks += 1
        num_rows += len(block)
    return BlockTable(url, num_blocks), num_rows


def stream_blocks(
    num_blocks: int,
    function: Callable[[int], pa.Table],
    *,
    concurrency: int,
    name: str = "blocks",
    counts: bool = False,
) -> ray.data.Dataset:
    """Make a lazy Ray Dataset of `function(block)` for every block, in block order, at most `concurrency` at once.

    A block mostly waits for actors, and a task is a process: with fewer CPUs than blocks in flight, a task works on
    several blocks in threads. Ray retries lost tasks; its dashboard shows the tasks as MapBatches(`name`).

    Args:
        num_blocks: number of blocks.
        function: makes a block.
        concurrency: blocks in flight.
        name: name of Ray's tasks.
        counts: the function makes one row of counts per block. They are handed over while their task goes on.
    """
    num_cpus = int(ray.cluster_resources().get("CPU", 0))
    num_tasks = min(concurrency, max(MIN_PROCESSES, num_cpus))
    num_threads = -(-concurrency // num_tasks)  # of each task, rounded up
    if num_threads == 1:
        num_groups = num_blocks
    else:
        # The last blocks of every task leave threads idle, so that the fewest tasks do the least waiting: one round,
        # an equal share of the blocks for each. But rows that a training reads come in the order of the blocks, and
        # with large tasks most of them would pile up behind the first one's.
        num_rounds = 1 if counts else -(-num_blocks // (concurrency * BLOCKS_PER_THREAD))
        num_groups = num_tasks * num_rounds
    num_groups = max(1, min(num_blocks, MAX_TASKS, num_groups))

    def compute_group(group: Any) -> Iterator[pa.Table]:
        block_numbers = [int(number) for number in group["item"]]
        with ThreadPoolExecutor(num_threads) as threads:
            yield from threads.map(function, block_numbers)

    compute_group.__name__ = name  # Ray names the tasks after the function
    groups = ray.data.from_items(list(range(num_blocks)), override_num_blocks=num_groups if num_blocks else None)
    groups.context.execution_options.preserve_order = True
    if counts:
        # A task hands over its output whenever it has gathered a block (Ray's) of this size.
        groups.context.target_max_block_size = COUNT_BYTES * max(1, num_blocks // (num_groups * REPORTS_PER_TASK))
    at_once = ray.data.TaskPoolStrategy(min(num_tasks, num_groups))
    mapped = groups.map_batches(compute_group, num_cpus=TASK_CPUS, compute=at_once)
    mapped.set_name(name)
    return mapped


def map_blocks(
    table: BlockTable,
    compute: Callable[[int], pa.Table],
    *,
    concurrency: int,
    describe: Callable[[pa.Table], Counts],
    progress: str,
) -> list[Counts]:
    """Fill `table` block by block; the driver sees only `describe(block)`, a few counts, in block order.

    Args:
        table: the table to fill; blocks that exist are not computed again.
        compute: makes a block.
        concurrency: blocks in flight.
        describe: counts of a block, for the driver.
        progress: label of the progress bar and of Ray's tasks.
    """

    def count(block: int) -> pa.Table:
        return pa.Table.from_pylist([dict(describe(table.memoised(block, compute)))])

    counted = stream_blocks(table.num_blocks, count, concurrency=concurrency, name=progress, counts=True)
    described: list[Counts] = []
    for row in track(counted.iter_rows(), progress, total=table.num_blocks):
        described.append(cast("Counts", row))
        meters.PROGRESS.set(len(described) / table.num_blocks, step=progress)
    return described
