"""The part that all training stages share: the stream of rows, and a fit with its curve."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray.data

from rayrl.config import DpoConfig, EvaluatedTrainingConfig, SftConfig, TrainingConfig
from rayrl.data.blocks import BlockTable, stream_blocks
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.metrics.curves import CurveRow, read_metrics
from rayrl.metrics.progress import progress_bars
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.run import FIT, Run
from rayrl.runs.stage_metrics import FitMetrics
from rayrl.runs.stage_table import Stage
from rayrl.training.launch import Rows, fit
from rayrl.training.steps import num_steps

STREAM_CONCURRENCY = 2
"""Blocks in flight where they only have to be read."""
POLL_S = 2.0
"""Between two looks at the curve for the progress bar."""
LAST_STEPS = 10
"""Steps whose mean loss is the final one."""


def drawn_holdout(prompt_ids: Collection[str], share: float, seed: int) -> frozenset[str]:
    """Draw a share of at least two prompts to hold out for validation; at least one prompt is on either side."""
    drawn = sorted(prompt_ids, key=lambda prompt_id: content_id("holdout", str(seed), prompt_id))
    num_held_out = min(max(1, round(share * len(drawn))), len(drawn) - 1)
    return frozenset(drawn[:num_held_out])


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows on which a training is evaluated along the way."""

    prompts: frozenset[str] = frozenset()
    """Prompts all of whose rows are held out."""
    table: BlockTable | None = None
    num_rows: int = 0


def hold_out(run: Run, stage: Stage, rows: BlockTable, training: SftConfig | DpoConfig) -> HeldOut:
    """Hold out the rows of a share of the prompts, if the training is evaluated; the table of rows must be complete.

    Raises:
        DataError: the rows have fewer than two prompts.
    """
    if training.evaluate_every is None:
        return HeldOut()
    found: set[str] = set()
    for block in rows.blocks():
        found.update(block["prompt_id"].to_pylist())
    if len(found) < 2:
        raise DataError(
            f"{stage.name}.evaluate_every needs rows of at least 2 prompts, one of them to evaluate on, got "
            f"{len(found)}; give more data, or leave {stage.name}.evaluate_every out"
        )
    prompts = drawn_holdout(found, training.holdout, run.seed)
    table = BlockTable(run.folder(stage, "held_out"), rows.num_blocks)
    num_rows = 0
    for number, block in enumerate(rows.blocks()):
        _, held_out = split(block, prompts)
        table.write(number, held_out)
        num_rows += held_out.num_rows
    return HeldOut(prompts=prompts, table=table, num_rows=num_rows)


def split(rows: pa.Table, held_out: frozenset[str]) -> tuple[pa.Table, pa.Table]:
    """Split rows into those of all other prompts and those of the held-out ones."""
    is_held_out = np.array([prompt_id in held_out for prompt_id in rows["prompt_id"].to_pylist()], dtype=bool)
    return rows.filter(pa.array(~is_held_out)), rows.filter(pa.array(is_held_out))


class Job(Protocol):
    """A training job, as far as this module has to know it."""

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        ...


J = TypeVar("J", bound=Job)


def stream_of(
    table: BlockTable,
    seed: int,
    compute: Callable[[int], pa.Table] | None = None,
    concurrency: int = STREAM_CONCURRENCY,
    without: frozenset[str] = frozenset(),
) -> ray.data.Dataset:
    """Stream a table's rows, block by block in an order drawn by the seed; the training shuffles and deals them.

    Args:
        table: where the blocks are.
        seed: draws the order of the blocks.
        compute: makes a block that is not there yet; it is made once, and read in later epochs.
        concurrency: blocks in flight.
        without: prompts whose rows are held out.
    """
    order = np.random.default_rng(seed).permutation(table.num_blocks)

    def read(position: int) -> pa.Table:
        number = int(order[position])
        block = table.memoised(number, compute) if compute else table.read(number)
        return split(block, without)[0] if without else block

    return stream_blocks(table.num_blocks, read, concurrency=concurrency, name="train")


def fit_stage(
    run: Run,
    services: Services,
    stage: Stage,
    loop: Callable[[J, Rows], None],
    job: J,
    training: TrainingConfig,
    stream: ray.data.Dataset,
    *,
    batch_size: int | None = None,
) -> FitMetrics:
    """Train, and return what the curve says: steps, first and final loss, seconds.

    In mode `alternate` the fleets make room for the training first.

    Args:
        run: the run.
        services: fleets.
        stage: names the fit and its curve.
        loop: the worker's loop, a function of the job and its rows.
        job: its argument.
        training: workers, epochs and restarts.
        stream: the rows.
        batch_size: rows of one logged step; None is `training.batch_size`.
    """
    if services.mode == "alternate":
        services.release()
    started = time.monotonic()
    with progress_of(run, stage, num_steps(job.num_rows, training, batch_size or training.batch_size)):
        fit(
            loop,
            job,
            training,
            stream,
            storage=run.folder(stage, FIT),
            on_gpu=services.on_gpu,
            name=f"{run.config.name}-{stage.name}",
        )
    seconds = time.monotonic() - started
    run.record_time(f"fit:{stage.name}", seconds)
    # PPO logs the policy that it starts from as step 0.
    curve = [row for row in read_metrics(run.curve(stage)) if row["step"] > 0]
    written = written_evaluation(curve, training)
    return FitMetrics(
        num_steps=len(curve),
        first_loss=curve[0]["loss"],
        final_loss=float(np.mean([row["loss"] for row in curve[-LAST_STEPS:]])),
        fit_s=seconds,
        eval_loss=written["eval_loss"] if written else None,
        best_step=written["step"] if written and chooses_best(training) else None,
    )


def chooses_best(training: TrainingConfig) -> bool:
    """Return whether a training writes the weights of its best evaluation."""
    return isinstance(training, EvaluatedTrainingConfig) and training.patience is not None


def written_evaluation(curve: list[CurveRow], training: TrainingConfig) -> CurveRow | None:
    """Find the evaluation of the written weights: with `patience` the first of the lowest loss, else the last.

    None without evaluations; one whose loss was not finite does not count.
    """
    evaluated = [row for row in curve if row.get("eval_loss") is not None]
    if not evaluated:
        return None
    return min(evaluated, key=lambda row: row["eval_loss"]) if chooses_best(training) else evaluated[-1]


def losses_of(fitted: FitMetrics) -> str:
    """Write where the loss went, for a stage's summary."""
    held_out = "" if fitted.eval_loss is None else f", {fitted.eval_loss:.3f} on held-out rows"
    best = "" if fitted.best_step is None else f" at step {fitted.best_step}, which is kept"
    return f"loss {fitted.first_loss:.3f} -> {fitted.final_loss:.3f}{held_out}{best}"


@contextmanager
def progress_of(run: Run, stage: Stage, total: int) -> Iterator[None]:
    """Show a progress bar that follows the curve rank 0 writes, and keep the planned steps beside it for `status`."""
    url = run.curve(stage)
    storage.write_json(storage.join(run.url, "metrics", f"{stage.name}.json"), {"num_steps": total})
    over = threading.Event()
    with progress_bars() as bars:
        bar = bars.add_task(stage.name, total=total)

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
