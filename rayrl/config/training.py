"""Settings that every training shares."""

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
