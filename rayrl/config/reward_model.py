"""Settings of the reward model r."""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.table import Place
from rayrl.config.training import EvaluatedTrainingConfig


class RewardModelConfig(EvaluatedTrainingConfig):
    """r: Bradley-Terry on the last token's hidden state, from M1."""

    path: Place | None = None
    """A ready-made reward model instead of a fitted r: a folder written by this stage in another run. A refresh still
    fits r^, from M1."""
    num_members: int = Field(default=1, gt=0)
    """Reward models trained on the same pairs with seeds of their own: an ensemble."""
    objective: Literal["mean", "worst_case", "uncertainty_weighted"] = "mean"
    """Combination of an ensemble's rewards (arXiv 2310.02743): a name in
    `rayrl.algorithms.rewards.ENSEMBLE_OBJECTIVES`, which is not read here: it needs torch."""
    variance_coef: float = Field(default=0.5, ge=0)
    """uncertainty_weighted: reward = mean - variance_coef x variance."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts whose pairs are kept back to measure accuracy and calibration."""
    learning_rate: float = Field(default=3e-6, gt=0)
    batch_size: int = Field(default=16, gt=0)
    """Pairs per optimizer step, over all workers."""

    @model_validator(mode="after")
    def _one_ready_made(self) -> "RewardModelConfig":
        if self.path is not None and self.num_members > 1:
            raise ValueError(
                f"reward_model.num_members must be 1 with a ready-made reward_model.path, got {self.num_members}"
            )
        return self
