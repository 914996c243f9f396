"""How each `fit()` trains."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table


class LoraConfig(Table):
    """Low-rank adapters instead of full fine-tuning; merged when the model is written."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainingConfig(Table):
    """How one `fit()` trains. Batch size is the only size set in samples; micro-batches follow from tokens."""

    epochs: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Samples (or pairs) per optimizer step, over all workers."""
    micro_batch_tokens: int = Field(default=8192, gt=0)
    """Tokens, padding included, in one forward pass of one worker."""
    num_workers: int = Field(default=1, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    cpu_offload: bool = False
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between checkpoints."""
    max_failures: int = Field(default=3, ge=0)
    """Worker losses survived before the fit gives up."""


class SftConfig(TrainingConfig):
    """M0 -> M1 by supervised fine-tuning on the seed data, loss on the response only."""

    enabled: bool = True
    """False: the policy is M1 already."""
    learning_rate: float = Field(default=2e-5, gt=0)
    epochs: int = Field(default=3, gt=0)


class EvaluatorConfig(TrainingConfig):
    """The proxy: trained on the paid judgements, it scores everything else."""

    type: Literal["generative", "scalar"] = "generative"
    scoring: Literal["score_first", "rationale_first"] = "score_first"
    """generative: read the score from one prefill, or write the rationale and read the score after it."""
    num_samples: int = Field(default=3, gt=0)
    """rationale_first: judgements sampled and averaged (Self-Rewarding LMs average 3)."""
    max_rationale_tokens: int = Field(default=160, gt=0)
    balanced: bool = False
    """generative: repeat rare scores until every score is as frequent as the commonest (ours)."""
    loss: Literal["regression", "bradley_terry"] = "regression"
    """scalar: squared error on the scores, or Bradley-Terry on pairs within a prompt (needs select.unit = "prompt")."""
    holdout: float = Field(default=0.15, gt=0, lt=1)
    """Share of the paid judgements kept back to validate the evaluator."""
    learning_rate: float = Field(default=1e-5, gt=0)
    epochs: int = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)


class PseudoLabelConfig(Table):
    """From scored responses to preference pairs."""

    pairing: Literal["best_worst", "margin"] = "best_worst"
    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are ties and are dropped."""
    mode: Literal["auto", "overlap", "alternate"] = "auto"
    """Score while DPO's first epoch trains, or before it. "auto" takes overlap when both fit the cluster at once."""
    synthetic: bool = Field(default=False, exclude_if=lambda synthetic: not synthetic)
    """Add the pairs of synthetic preference generation (`refresh.spg`) on the same responses and scores. It needs every
    score before the first step. Not dumped where it is off: stages of before it was there keep their keys."""


class DpoConfig(TrainingConfig):
    """M1 -> M2 by direct preference optimisation (arXiv 2305.18290)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    length_normalised: bool = False
    reference: Literal["auto", "generation", "pass"] = "auto"
    """Reference log-probabilities from generation (exact in float32), or from one pass before the first step."""
