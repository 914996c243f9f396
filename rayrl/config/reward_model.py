"""Settings of the reward model r."""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.table import Place, Table
from rayrl.config.training import EvaluatedTrainingConfig


class BottleneckConfig(Table):
    """Variational information bottleneck of the reward head (InfoRM, arXiv 2402.09345)."""

    beta: float = Field(default=0.1, ge=0)
    """Loss per nat of the divergence of a response's code from a standard normal distribution."""
    z_dim: int = Field(default=128, gt=0)
    """Dimensions of a code, by default those of InfoRM's release."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the head, which starts from nothing; its schedule is the reward model's (ours)."""


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
    bottleneck: BottleneckConfig | None = None
    """Read the reward off a noisy code of the hidden state that holds as little as the preferences need; None reads it
    off the state itself."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts whose pairs are kept back to measure accuracy and calibration."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """Highest learning rate, reached after the warm-up."""
    batch_size: int = Field(default=16, gt=0)
    """Pairs per optimizer step, over all workers."""

    @model_validator(mode="after")
    def _one_ready_made(self) -> "RewardModelConfig":
        if self.path is not None and self.num_members > 1:
            raise ValueError(
                f"reward_model.num_members must be 1 with a ready-made reward_model.path, got {self.num_members}"
            )
        return self
