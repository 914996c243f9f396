"""Settings that every training shares."""

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rayrl.config.table import Operation, Table

CHECKPOINTED_PARAMETERS = 1_000_000_000
"""Parameters from which on gradient checkpointing is worth its time, unless the setting says otherwise."""
MAX_LEARNING_RATE = 0.1
"""Far beyond any that trains: a larger one is a slip, such as a lost exponent."""
DECIDED_ELSEWHERE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_tokens",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "managed_gradient_accumulation": "micro_batch_tokens",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate, adam_betas, adam_eps and weight_decay",
    "scheduler": "schedule, warmup_ratio and min_learning_rate_share",
    "bf16": "policy.dtype",
    "fp16": "policy.dtype",
    "data_types.grad_accum_dtype": "grad_accum_dtype",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "cpu_offload",
    "zero_optimization.offload_param": "cpu_offload",
}
"""DeepSpeed's settings that follow from the training's own, and which."""


class LoraConfig(Table):
    """Low-rank adapters instead of full fine-tuning; merged when the model is written, and kept beside it."""

    rank: int = Field(default=16, gt=0)
    """Of the two matrices of an adapter."""
    alpha: int = Field(default=32, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' input, in SFT, evaluators and reward models; they also keep the dropout of the model's config.
    DPO and PPO train without any dropout."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter. "all-linear" is all but the output head; the experts of a mixture
    are no linear layers, and stay as they are."""
    quantization: Literal["nf4"] | None = None
    """"nf4" freezes the linear layers' weights in 4 bits (QLoRA, arXiv 2305.14314), a quarter of bfloat16's memory.
    What is served and written is what was trained: the dequantised weights with the adapters merged. Needs the package
    bitsandbytes (`pip install "rayrl[qlora]"`), and a zero_stage below 3."""


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
    min_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """linear, cosine: share of the learning rate that the decay ends at."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's means of the gradients and of their squares, per step."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added by AdamW to the root of the mean square before it divides by it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
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
    """DeepSpeed ZeRO: shard the optimizer's state (1), the gradients too (2), and the weights too (3). In bfloat16 with
    gradients added up in float32, which DeepSpeed has from stage 1 on, 0 runs as 1."""
    cpu_offload: Operation[bool] = False
    """With zero_stage 1 or higher: keep the optimizer's state in the machine's memory; with 3 the weights too."""
    grad_accum_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: precision in which the gradients of a step's micro-batches are added up. In bfloat16, small gradients
    are lost beside the sum of many; float32 takes 4 bytes more per trained parameter with zero_stage 0 and 1, and 2
    more per trained parameter of a worker's shard with 2 and 3."""
    gradient_checkpointing: Operation[bool | None] = None
    """Compute activations again in the backward pass: less memory, more time. None does so from a billion parameters
    on."""
    deepspeed: dict[str, Any] = Field(default={})
    """Passed to DeepSpeed as it is, such as `zero_optimization = { reduce_bucket_size = 50_000_000 }`. Settings that
    follow from this table's own are refused."""
    lora: LoraConfig | None = None
    """None trains all weights."""
    checkpoint_every: Operation[int] = Field(default=100, gt=0)
    """Steps between checkpoints."""
    max_failures: Operation[int] = Field(default=3, ge=0)
    """Losses of a worker that the training survives; after one more it gives up."""

    @field_validator("learning_rate", "value_learning_rate", check_fields=False)
    @classmethod
    def _small_steps(cls, rate: float | None) -> float | None:
        if rate is not None and rate > MAX_LEARNING_RATE:
            raise ValueError(
                f"must be at most {MAX_LEARNING_RATE:g}, got {rate:g}: AdamW moves every weight by about the learning "
                "rate in each step, and weights are small numbers; 1e-6 to 1e-5 is usual, and ten times that with lora"
            )
        return rate

    @field_validator("adam_betas")
    @classmethod
    def _betas_are_decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"must be two numbers from 0 to below 1, got {list(betas)}; AdamW's usual are [0.9, 0.999]"
            )
        return betas

    @field_validator("cpu_offload")
    @classmethod
    def _offload_needs_shards(cls, cpu_offload: bool, info: ValidationInfo) -> bool:
        if cpu_offload and info.data.get("zero_stage") == 0:
            raise ValueError(
                "must be false with zero_stage = 0, got true: DeepSpeed moves the optimizer's state from stage 1 on; "
                "set zero_stage to 1, 2 or 3"
            )
        return cpu_offload

    @property
    def is_quantized(self) -> bool:
        """Return whether adapters are trained on weights in 4 bits."""
        return self.lora is not None and self.lora.quantization is not None

    @model_validator(mode="after")
    def _quantized_weights_are_whole(self) -> Self:
        if self.is_quantized and self.zero_stage == 3:
            raise ValueError(
                "zero_stage must be 0, 1 or 2 with lora.quantization, got 3: weights in 4 bits are not sharded; set "
                "zero_stage to 2, or leave lora.quantization out"
            )
        return self

    @field_validator("deepspeed")
    @classmethod
    def _decided_once(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for dotted, own in DECIDED_ELSEWHERE.items():
            table, _, key = dotted.rpartition(".")
            inside: object = settings.get(table, {}) if table else settings
            if isinstance(inside, Mapping) and key in inside:
                value = cast("Mapping[str, object]", inside)[key]
                raise ValueError(f"must leave {dotted} to {own}, got {value!r}; remove it, and set {own}")
        return settings

    @classmethod
    def without_dropout(cls, lora: LoraConfig | None) -> LoraConfig | None:
        """Refuse adapters with dropout, for trainings whose loss is on the ratio of two policies."""
        if lora is not None and lora.dropout > 0:
            raise ValueError(
                f"must have dropout = 0 here, got {lora.dropout}: the ratio of two policies is read without dropout; "
                "leave it out"
            )
        return lora

    def checkpoints_gradients(self, num_parameters: int) -> bool:
        """Return whether activations of a model of this size are computed again in the backward pass."""
        if self.gradient_checkpointing is None:
            return num_parameters >= CHECKPOINTED_PARAMETERS
        return self.gradient_checkpointing


class EvaluatedTrainingConfig(TrainingConfig):
    """Settings of a training that can be evaluated on held-out rows along the way. PPO has its own evaluations."""

    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between two evaluations: the mean loss of the rows of the held-out prompts (`holdout`), without dropout;
    the last step is evaluated, too. None evaluates never."""
    patience: int | None = Field(default=None, gt=0)
    """Evaluations in a row without a lower loss after which the training stops. The model that is written is then the
    one of the lowest loss, also where the training does not stop early. None writes the last."""

    @field_validator("patience")
    @classmethod
    def _patience_needs_evaluations(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("evaluate_every") is None:
            raise ValueError(
                f"must be left out without evaluate_every, got {patience}: it counts evaluations; set evaluate_every"
            )
        return patience
