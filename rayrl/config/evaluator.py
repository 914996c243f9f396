"""Settings of the evaluator, the proxy that is trained on the paid judgements."""

from typing import Literal

from pydantic import Field

from rayrl.config.training import EvaluatedTrainingConfig


class EvaluatorConfig(EvaluatedTrainingConfig):
    """The proxy: trained on the paid judgements, it scores all other responses."""

    type: Literal["generative", "scalar", "head"] = "generative"
    """"generative" writes a judgement, as the oracle does; "scalar" is a head on the last hidden state. Both fine-tune
    M1. "head" trains no model: linear heads on the vectors of `select.embedder`, in seconds, for few labels."""
    scoring: Literal["score_first", "rationale_first"] = "score_first"
    """generative: read the score from one prefill, or write the rationale and read the score after it."""
    num_samples: int = Field(default=3, gt=0)
    """rationale_first: judgements sampled and averaged (Self-Rewarding LMs average 3)."""
    max_rationale_tokens: int = Field(default=160, gt=0)
    """rationale_first: longest rationale."""
    balanced: bool = False
    """generative: repeat rare scores until every score is as frequent as the commonest (ours)."""
    loss: Literal["regression", "bradley_terry"] = "regression"
    """scalar: squared error on the scores, or Bradley-Terry on pairs within a prompt (needs select.unit = "prompt")."""
    holdout: float = Field(default=0.15, gt=0, lt=1)
    """Share of the paid judgements kept back to validate the evaluator."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest learning rate, reached after the warm-up."""
    epochs: int = Field(default=3, gt=0)
    """Passes over the rows."""
    batch_size: int = Field(default=16, gt=0)
    """Judgements per optimizer step, over all workers."""

    @property
    def trains_model(self) -> bool:
        """Return whether a language model is fine-tuned."""
        return self.type != "head"

    @property
    def served_by(self) -> Literal["generators", "embedders"]:
        """The engines that serve it, by the name of their config table."""
        return "generators" if self.type == "generative" else "embedders"
