"""Steps through the data, as every training takes them: resume, one optimizer step at a time, checkpoint."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pyarrow as pa
from torch import Tensor, nn

from rayrl.algorithms.early_stopping import EarlyStopping
from rayrl.config import TrainingConfig
from rayrl.data.batches import deal, optimizer_batches
from rayrl.errors import TrainingStopped
from rayrl.metrics.curves import MetricLog
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch

R = TypeVar("R", bound=Mapping[str, object])


class Step(NamedTuple, Generic[R]):
    """One optimizer step to be taken."""

    number: int
    """From 1, over all epochs."""
    rows: list[R]
    """This rank's share; empty on some ranks if the step has fewer rows than there are ranks."""
    waited_s: float
    """For the rows."""


class CurveLog(Protocol):
    """Writes one point of the training's curve."""

    def __call__(self, step: int, **values: float | Tensor) -> None: ...


def num_steps(num_rows: int, training: TrainingConfig, batch_size: int) -> int:
    """Return the optimizer steps of a fit over `num_rows` rows, `batch_size` of them a step."""
    steps_per_epoch = -(-num_rows // batch_size)  # the last one may be smaller
    return training.epochs * steps_per_epoch


def rank_batches(
    data: Callable[[], Iterable[pa.Table]], *, epochs: int, batch_size: int, seed: int, skip: int
) -> Iterator[list[Any]]:
    """Yield this rank's share of the batches of all epochs, without the first `skip`. All ranks take part."""
    batches = optimizer_batches(data, epochs=epochs, batch_size=batch_size, seed=seed, skip=skip)
    return deal((rows for _, rows in batches), launch.rank(), launch.world_size(), zero.scattered)


def steps(
    engine: zero.Engine[nn.Module],
    training: TrainingConfig,
    seed: int,
    data: Callable[[], Iterable[pa.Table]],
    stopping: EarlyStopping,
) -> Iterator[Step[Any]]:
    """Yield the steps after the last checkpoint, until the rows of all epochs are used or `stopping` ends them.

    The caller takes one optimizer step per item, and counts the evaluations in `stopping`, whose state is kept in the
    checkpoints. After `checkpoint_every` steps, and at the end, the state is saved on every rank.
    """
    noted = restore(engine)
    number = int(noted.get("step", 0))
    stopping.best_loss = noted.get("best_loss", stopping.best_loss)
    stopping.num_worse = int(noted.get("num_worse", stopping.num_worse))
    saved: int | None = None
    batches = rank_batches(data, epochs=training.epochs, batch_size=training.batch_size, seed=seed, skip=number)

    def save() -> None:
        checkpoint(engine, number, best_loss=stopping.best_loss, num_worse=stopping.num_worse)

    while not stopping.is_over:
        asked = time.monotonic()
        rows = next(batches, None)
        if rows is None:
            break
        waited_s = time.monotonic() - asked
        number += 1
        yield Step(number, rows, waited_s)
        if number % training.checkpoint_every == 0:
            save()
            saved = number
    # The end is not always a multiple of `checkpoint_every`.
    if number != saved:
        save()


def restore(engine: zero.Engine) -> dict[str, float]:
    """Load the fit's last checkpoint that is whole and undamaged on all ranks, and return what was noted with it.

    Empty without such a checkpoint.
    """
    for name in launch.whole_checkpoints():
        with launch.fetched(name) as folder:
            if zero.max_over_ranks(launch.is_damaged(name, folder), engine) == 0:
                return zero.load(engine, folder)
    return {}


def checkpoint(engine: zero.Engine[nn.Module], step: int, **noted: float) -> None:
    """Register a checkpoint of this step with Ray Train; `noted` is kept in it. All ranks take part.

    Raises:
        TrainingStopped: the weights are not finite numbers; the checkpoint before this one is the last.
    """
    if not zero.has_finite_weights(engine):
        raise TrainingStopped(f"the weights are not finite after step {step}, and are not kept; {zero.REMEDY}")
    position = {"step": step, **noted}
    launch.report(position, lambda folder: zero.save(engine, folder, position))


def row_names(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Name rows for messages, by the id of their pair, their response or their prompt."""
    names: list[str] = []
    for row in rows:
        if "chosen_id" in row:
            names.append(f"{row['chosen_id']}/{row['rejected_id']}")
        else:
            names.append(str(row.get("response_id") or row.get("prompt_id") or row.get("id")))
    return names


@contextmanager
def rank_zero_log(run_url: str, stage: str) -> Iterator[CurveLog]:
    """Open the stage's curve on rank 0; the log of the other ranks does nothing."""
    if launch.rank() != 0:
        yield lambda step, **values: None
        return
    with MetricLog(run_url, stage) as log:
        yield log.log
