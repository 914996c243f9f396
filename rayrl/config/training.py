"""Settings that every training shares."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Operation, Table


class LoraConfig(Table):
    """Low-rank adapters instead of full fine-tuning; merged when the model is written."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class TrainingConfig(Table):
    """Settings of one training. Batch size is the only size set in samples; micro-batches follow from tokens."""

    epochs: int = Field(default=1, gt=0)
    """Passes over the data."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    batch_size: int = Field(default=64, gt=0)
    """Samples (or pairs) per optimizer step, over all workers."""
    micro_batch_tokens: Operation[int] = Field(default=8192, gt=0)
    """Tokens, padding included where a model needs it, in one forward pass of one worker. A sample
    that is longer has a pass of its own."""
    num_workers: Operation[int] = Field(default=1, gt=0)
    """Training processes, one per GPU where there are GPUs."""
    zero_stage: Operation[Literal[0, 1, 2, 3]] = 0
    """DeepSpeed ZeRO: shard the optimizer's state (1), the gradients too (2), and the weights too (3)."""
    cpu_offload: Operation[bool] = False
    """With zero_stage 1 or higher: keep the optimizer's state in the machine's memory; with 3 the weights too."""
    gradient_checkpointing: Operation[bool] = False
    """Compute activations again in the backward pass: less memory, more time."""
    lora: LoraConfig | None = None
    """None trains all weights."""
    checkpoint_every: Operation[int] = Field(default=100, gt=0)
    """Steps between checkpoints."""
    max_failures: Operation[int] = Field(default=3, ge=0)
    """Losses of a worker that the training survives; after one more it gives up."""
