"""Settings of direct preference optimisation."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayrl.config.training import EvaluatedTrainingConfig, LoraConfig


class DpoConfig(EvaluatedTrainingConfig):
    """M1 -> M2 by direct preference optimisation (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """A name in `rayrl.algorithms.preference.PREFERENCE_LOSSES`, which is not read here: it needs torch."""
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward per nat of log-ratio: the larger, the closer the policy stays to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid (conservative DPO) and robust: assumed probability that the label of a pair is flipped."""
    length_normalised: bool = False
    """Divide the log-ratio of each response by its number of tokens. With "ipo" it is IPO as its authors' own code and
    TRL have it; without, as it was published."""
    margin: float = Field(default=0.0, ge=0)
    """Reward by which the chosen response must be ahead of the rejected one (arXiv 2405.14734)."""
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of -log pi of the chosen response, mean over its tokens, beside the loss (RPO, arXiv 2404.19733)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the tokens by which a response is longer than the other of its pair (arXiv 2409.06411); 1 is DPO."""
    weighting: Literal["none", "on_policy"] = "none"
    """"on_policy" weighs each pair by how likely the policy is to write its responses (WPO: arXiv 2406.11827)."""
    reference: Literal["auto", "generation", "pass", "none"] = "auto"
    """Reference log-probabilities from generation (exact in float32), or from one pass before the first step. "none"
    trains on log-probabilities alone: with `length_normalised` and a `margin` this is SimPO (arXiv 2405.14734)."""

    holdout: float = Field(default=0.05, gt=0, lt=1)
    """evaluate_every: share of the prompts whose pairs are kept back for the evaluations. All pairs are then made
    before the first step, also in mode `overlap`."""

    @field_validator("lora")
    @classmethod
    def _reads_ratios(cls, lora: LoraConfig | None) -> LoraConfig | None:
        return cls.without_dropout(lora)

    @model_validator(mode="after")
    def _consistent(self) -> "DpoConfig":
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError(
                f'dpo.label_smoothing must be 0 with dpo.loss = "ipo", which has no smoothed form, got '
                f'{self.label_smoothing:g}; leave it out, or set dpo.loss = "robust"'
            )
        if self.ld_alpha < 1 and self.reference == "generation":
            raise ValueError(
                'dpo.reference must be "auto", "pass" or "none" with dpo.ld_alpha below 1, got "generation": '
                "generation keeps one sum for a response, and each pair weighs the response's tokens in its own way"
            )
        if self.is_quantized and self.reference == "generation":
            raise ValueError(
                'dpo.reference must be "auto", "pass" or "none" with dpo.lora.quantization, got "generation": engines '
                "serve M1 unquantised, and the reference is M1 in 4 bits, from which the adapters start"
            )
        return self
