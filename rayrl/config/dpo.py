"""Settings of direct preference optimisation."""

from typing import Literal

from pydantic import Field, field_validator

from rayrl.config.training import LoraConfig, TrainingConfig


class DpoConfig(TrainingConfig):
    """M1 -> M2 by direct preference optimisation (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """A name in `rayrl.algorithms.preference.PREFERENCE_LOSSES`, which is not read here: it needs torch."""
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward per nat of log-ratio: the larger, the closer the policy stays to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: assumed probability that the label of a pair is flipped."""
    length_normalised: bool = False
    """Divide the log-ratio of each response by its number of tokens."""
    reference: Literal["auto", "generation", "pass"] = "auto"
    """Reference log-probabilities from generation (exact in float32), or from one pass before the first step."""

    @field_validator("lora")
    @classmethod
    def _reads_ratios(cls, lora: LoraConfig | None) -> LoraConfig | None:
        return cls.without_dropout(lora)
