"""Settings of supervised fine-tuning on the seed data."""

from typing import Literal

from pydantic import Field

from rayrl.config.training import EvaluatedTrainingConfig


class SftConfig(EvaluatedTrainingConfig):
    """M0 -> M1 by supervised fine-tuning on the seed data, loss on the assistant's turns only."""

    enabled: bool = True
    """False: the policy is M1 already."""
    turns: Literal["last", "all"] = "last"
    """Turns of the assistant in a chat of the seed data that are learnt from: the one at its end, or each of them."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Highest learning rate, reached after the warm-up."""
    holdout: float = Field(default=0.05, gt=0, lt=1)
    """evaluate_every: share of the prompts whose examples are kept back for the evaluations."""
    epochs: int = Field(default=3, gt=0)
    """Passes over the rows."""
