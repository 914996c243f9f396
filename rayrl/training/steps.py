"""The walk through the data that every training shares: resume, one step at a time, checkpoint."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rayrl.config import TrainingConfig
from rayrl.data.batches import Row, optimizer_batches
from rayrl.metrics.curves import MetricLog
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch


def num_steps(num_rows: int, training: TrainingConfig) -> int:
    """Optimizer steps of a fit over `num_rows` samples."""
    return training.epochs * -(-num_rows // training.batch_size)


def steps(
    engine: Any, training: TrainingConfig, seed: int, rows: Callable[[], Iterable[Row]]
) -> Iterator[tuple[int, list[Row], float]]:
    """Yield (step, this rank's rows, seconds waited for them) until every rank is out of rows.

    Continues after the last checkpoint.

    The caller takes one optimizer step per item. After `checkpoint_every` of them, and at the end, the state is saved
    on every rank.
    """
    saved = None
    step = int(restore(engine).get("step", 0))
    share = -(-training.batch_size // launch.world_size())
    stream = optimizer_batches(rows, epochs=training.epochs, batch_size=share, seed=seed, skip=step)
    while True:
        asked = time.monotonic()
        _, batch = next(stream, (training.epochs, []))
        waited_s = time.monotonic() - asked
        if zero.largest(len(batch), engine) == 0:
            break
        step += 1
        yield step, batch, waited_s
        if step % training.checkpoint_every == 0:
            checkpoint(engine, step)
            saved = step
    if step != saved:
        checkpoint(engine, step)


def restore(engine: Any) -> dict[str, float]:
    """Load the fit's last checkpoint that is whole on all ranks, if there is one; what was noted with it."""
    for name in launch.whole_checkpoints():
        with launch.opened(name) as folder:
            if zero.largest(launch.damaged(name, folder), engine) == 0:
                return zero.load(engine, folder)
    return {}


def names_of(rows: list[Row]) -> list[str]:
    """What rows are called in messages: by their pair's, their response's or their prompt's id."""
    return [
        f"{row['chosen_id']}/{row['rejected_id']}"
        if "chosen_id" in row
        else str(row.get("response_id") or row.get("prompt_id") or row.get("id"))
        for row in rows
    ]


def checkpoint(engine: Any, step: int, **noted: float) -> None:
    """Register a checkpoint of this step with Ray Train; `noted` goes with it and into the fit's metrics."""
    position = {"step": step, **noted}
    launch.report(position, lambda folder: zero.save(engine, folder, position))


@contextmanager
def rank_zero_log(run_url: str, stage: str) -> Iterator[Callable[..., None]]:
    """`log(step, **values)`: one process writes the curve, the others' calls do nothing."""
    if launch.rank() != 0:
        yield lambda step, **values: None
        return
    with MetricLog(run_url, stage) as log:
        yield log.log
