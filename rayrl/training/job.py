"""Training job: what every worker of a fit is given, whatever it trains.

A job is a picklable record. The weights that a training starts from are a checkpoint, apart from the run's own policy
settings, which stay as the user wrote them.
"""

from dataclasses import dataclass

import torch

from rayrl.config import PolicyConfig


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
