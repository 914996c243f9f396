"""What the three training stages share: the stream of rows per rank, and the fit with its curve."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.config import TrainingConfig
from rayrl.data.blocks import BlockTable, stream_blocks
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.metrics.progress import progress_bars
from rayrl.runs import storage
from rayrl.runs.run import Run
from rayrl.training.launch import Rows, Stream, fit
from rayrl.training.steps import num_steps

STREAM_CONCURRENCY = 2
POLL_S = 2.0


def stream_of(
    table: BlockTable,
    seed: int,
    compute: Callable[[int], pa.Table] | None = None,
    concurrency: int = STREAM_CONCURRENCY,
) -> Stream:
    """Rows of a table for each rank, block by block in an order drawn by the seed.

    Args:
        table: where the blocks are.
        seed: draws the order of the blocks.
        compute: makes a block that is not there yet (streaming); it is made once, and read in later epochs.
        concurrency: blocks in flight.
    """
    order = np.random.default_rng(seed).permutation(table.num_blocks)

    def of_rank(rank: int, world_size: int) -> Any:
        blocks = order[rank::world_size]

        def block(position: int) -> pa.Table:
            number = int(blocks[position])
            return table.memoised(number, compute) if compute else table.read(number)

        return stream_blocks(len(blocks), block, concurrency=concurrency, name="train")

    return of_rank


def fit_stage(
    run: Run,
    services: Services,
    stage: str,
    loop: Callable[[Any, Rows], None],
    job: Any,
    training: TrainingConfig,
    stream: Stream,
) -> dict[str, Any]:
    """Train (in mode `alternate` the fleets make room), note the time; first and final loss, steps and seconds."""
    if services.mode == "alternate":
        services.release()
    started = time.monotonic()
    with progress_of(run, stage, num_steps(job.num_rows, training)):
        name = f"{run.config.name}-{stage}"
        fit(loop, job, training, stream, storage=run.folder(stage, "fit"), on_gpu=services.on_gpu, name=name)
    seconds = time.monotonic() - started
    run.record_time(f"fit:{stage}", seconds)
    curve = [row for row in read_metrics(storage.join(run.url, "metrics", f"{stage}.jsonl")) if row["step"]]
    return {
        "num_steps": len(curve),
        "first_loss": curve[0]["loss"],
        "final_loss": float(np.mean([row["loss"] for row in curve[-10:]])),
        "fit_s": seconds,
    }


@contextmanager
def progress_of(run: Run, stage: str, total: int) -> Iterator[None]:
    """A progress bar that follows the curve rank 0 writes; how long it will be is kept beside it for others to see."""
    url = storage.join(run.url, "metrics", f"{stage}.jsonl")
    storage.write_json(storage.join(run.url, "metrics", f"{stage}.json"), {"num_steps": total})
    over = threading.Event()
    with progress_bars() as bars:
        bar = bars.add_task(stage, total=total)

        def follow() -> None:
            while not over.wait(POLL_S):
                curve = read_metrics(url)
                bars.update(bar, completed=curve[-1]["step"] if curve else 0)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
