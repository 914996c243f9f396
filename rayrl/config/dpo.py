"""Direct preference optimisation."""

from typing import Literal

from pydantic import Field

from rayrl.config.training import TrainingConfig


class DpoConfig(TrainingConfig):
    """M1 -> M2 by direct preference optimisation (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    length_normalised: bool = False
    reference: Literal["auto", "generation", "pass"] = "auto"
    """Reference log-probabilities from generation (exact in float32), or from one pass before the first step."""
