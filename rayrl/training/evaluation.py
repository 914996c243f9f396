"""Evaluation of a training on held-out rows along the way, and the choice of the weights that it leaves.

The loss is the training's own, its mean over the held-out rows, without dropout and without gradients. With `patience`
the weights are exported at each evaluation with the lowest loss so far, in the place of those before: memory holds no
second copy of them. A training that goes on from a checkpoint has the state of its evaluations from there.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from rayrl.algorithms.early_stopping import EarlyStopping
from rayrl.config import EvaluatedTrainingConfig
from rayrl.training import deepspeed_engine as zero
from rayrl.training.job import EvaluatedJob
from rayrl.training.steps import rank_batches

B = TypeVar("B")


@dataclass(kw_only=True)
class Evaluation(Generic[B]):
    """The evaluations of one training, and its export. All ranks take part in each of them."""

    job: EvaluatedJob
    training: EvaluatedTrainingConfig
    num_steps: int
    """Of the whole training: its last step is always evaluated."""
    tables: Callable[[], Iterable[pa.Table]]
    """Reads the job's held-out rows; called on rank 0 alone."""
    engine: zero.Engine
    collated: Callable[[list[Any]], Sequence[B]]
    """Makes micro-batches of rows, on the device."""
    summed_loss: Callable[[B], Tensor]
    """Sum of the losses of a micro-batch's samples."""
    weight: Callable[[B], float]
    """A micro-batch's part of the mean's denominator (samples, or tokens)."""
    idle: B
    """A micro-batch to run without a part in the mean while other ranks still work."""
    export: Callable[[], None]
    """Writes the model as it is."""
    stopping: EarlyStopping = field(init=False)

    def __post_init__(self) -> None:
        self.stopping = EarlyStopping(self.training.patience)

    def after(self, step: int) -> dict[str, float]:
        """Evaluate after a step, where that is due, and return the values for the curve."""
        every = self.training.evaluate_every
        if self.job.held_out is None or every is None or (step % every and step != self.num_steps):
            return {}
        started = time.monotonic()
        batches = rank_batches(self.tables, epochs=1, batch_size=self.training.batch_size, seed=self.job.seed, skip=0)
        loss = mean_loss(self.engine, map(self.collated, batches), self.summed_loss, self.weight, self.idle)
        if self.stopping.improves(loss) and self.training.patience is not None:
            self.export()
        return {"eval_loss": loss, "evaluate_s": time.monotonic() - started}

    def finish(self) -> None:
        """Export the last weights, unless those of the lowest loss are there instead."""
        if self.training.patience is None or math.isinf(self.stopping.best_loss):
            self.export()


def mean_loss(
    engine: zero.Engine,
    batches: Iterable[Sequence[B]],
    summed_loss: Callable[[B], Tensor],
    weight: Callable[[B], float],
    idle: B,
) -> float:
    """Return the mean loss of the batches of all ranks, which have equally many; see `Evaluation`."""
    own_loss, own_weight = 0.0, 0.0
    engine.eval()
    with torch.no_grad():
        for micro_batches in batches:
            # Under ZeRO-3 a forward pass is a collective: ranks with fewer micro-batches read idle ones.
            for i in range(int(zero.max_over_ranks(len(micro_batches), engine))):
                if i < len(micro_batches):
                    own_loss += summed_loss(micro_batches[i]).item()
                    own_weight += weight(micro_batches[i])
                else:
                    summed_loss(idle)
    engine.train()
    return zero.sum_over_ranks(own_loss, engine) / zero.sum_over_ranks(own_weight, engine)
