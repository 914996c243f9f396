"""Settings of supervised fine-tuning on the seed data."""

from pydantic import Field

from rayrl.config.training import TrainingConfig


class SftConfig(TrainingConfig):
    """M0 -> M1 by supervised fine-tuning on the seed data, loss on the response only."""

    enabled: bool = True
    """False: the policy is M1 already."""
    learning_rate: float = Field(default=2e-5, gt=0)
    epochs: int = Field(default=3, gt=0)
