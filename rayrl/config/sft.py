"""Settings of supervised fine-tuning on the seed data."""

from pydantic import Field

from rayrl.config.training import EvaluatedTrainingConfig


class SftConfig(EvaluatedTrainingConfig):
    """M0 -> M1 by supervised fine-tuning on the seed data, loss on the response only."""

    enabled: bool = True
    """False: the policy is M1 already."""
    learning_rate: float = Field(default=2e-5, gt=0)
    holdout: float = Field(default=0.05, gt=0, lt=1)
    """evaluate_every: share of the prompts whose examples are kept back for the evaluations."""
    epochs: int = Field(default=3, gt=0)
