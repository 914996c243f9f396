"""Training job: what every worker of a fit is given, whatever it trains.

A job is a picklable record. The weights that a training starts from are a checkpoint, apart from the run's own policy
settings, which stay as the user wrote them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch

from rayrl.config import PolicyConfig
from rayrl.data.blocks import BlockTable


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Fields of all jobs."""

    stage: str
    """Name of the training's curve."""
    run_url: str
    """Folder of the run or round, under which the curve is written."""
    checkpoint_url: str
    """Folder for the trained model."""
    policy: PolicyConfig
    """The run's own: tokenizer, prompt format, context, and whether remote code is trusted."""
    dtype: str
    seed: int
    num_rows: int
    """Rows that are expected in an epoch; sets the length of the learning-rate schedule."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class EvaluatedJob(TrainingJob):
    """A job whose training can be evaluated along the way."""

    held_out: BlockTable | None = None
    """Rows that are evaluated and not trained on; None evaluates never."""

    def held_out_tables(self) -> Iterator[pa.Table]:
        """Read the held-out rows, one block in memory at a time."""
        if self.held_out is not None:
            yield from self.held_out.blocks()
