"""DeepSpeed behind a few verbs: start, step, gather, save, load. The only importer of deepspeed.

One optimizer step is any number of micro-batches; ranks may have different numbers of rows, and a rank without rows
takes part with a zero loss, so that collectives always meet and no row is dropped.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrl.config import TrainingConfig


def zero_config(training: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration; `managed_gradient_accumulation` off: a step ends where we say so."""
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.cpu_offload and training.zero_stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu"}
        if training.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "weight_decay": training.weight_decay,
                "torch_adam": not torch.cuda.is_available(),
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def prepare_zero3(training: TrainingConfig, dtype: torch.dtype) -> Any:
    """Make `from_pretrained` shard as it loads (ZeRO-3). Keep the returned object alive until the model is loaded."""
    if training.zero_stage != 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    _without_compiler()
    return HfDeepSpeedConfig(zero_config(training, dtype))


def start(model: nn.Module, training: TrainingConfig, dtype: torch.dtype, num_steps: int) -> Any:
    """Wrap a model for training over all workers of the fit."""
    import deepspeed

    _without_compiler()
    if training.gradient_checkpointing:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
                break
    # Gradients of a sharply peaked softmax are full of denormal numbers, on which a CPU's matrix products run several
    # times slower. Flushed, they are zero; what a step changes by them is far below float32's resolution.
    torch.set_flush_denormal(True)
    os.environ.setdefault("LOCAL_RANK", "0")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],  # type: ignore[arg-type]
        config=zero_config(training, dtype),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule(step, num_steps, training)
        ),  # type: ignore[arg-type]
        dist_init_required=False,
    )
    return engine


def _without_compiler() -> None:
    """On CPU DeepSpeed would compile a shared-memory all-reduce when it first meets the process group.

    That takes minutes, a C++ compiler, and a lock file that a killed process leaves for ever. gloo reduces as well.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def schedule(step: int, num_steps: int, training: TrainingConfig) -> float:
    """Factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to a tenth."""
    warmup = math.ceil(training.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if training.schedule == "linear":
        return 1.0 - 0.9 * progress
    if training.schedule == "cosine":
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    return 1.0


def total(value: float, engine: Any) -> float:
    """Sum of a number over the ranks."""
    return _reduce(value, engine, dist.ReduceOp.SUM)


def largest(value: float, engine: Any) -> float:
    """Largest of a number over the ranks."""
    return _reduce(value, engine, dist.ReduceOp.MAX)


def summed(tensor: Tensor, engine: Any) -> Tensor:
    """Elementwise sum of a tensor over the ranks."""
    if not dist.is_initialized():
        return tensor
    everywhere = tensor.to(engine.device)
    dist.all_reduce(everywhere, dist.ReduceOp.SUM)
    return everywhere.to(tensor.device)


def _reduce(value: float, engine: Any, operation: Any) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=engine.device)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor.item()


def train_step(
    engine: Any,
    micro_batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    weight: float,
    idle: Any,
    names: Sequence[str] = (),
) -> float:
    """One optimizer step on the mean loss over all ranks.

    Args:
        engine: the DeepSpeed engine.
        micro_batches: this rank's micro-batches; may be empty, and differ in number between ranks.
        loss_of: sum of the losses of a micro-batch's samples.
        weight: this rank's share of the mean's denominator (samples, or tokens).
        idle: a micro-batch to run at zero weight while other ranks still work.
        names: what this rank's rows are called, for the message when they break the loss.

    Returns:
        The mean loss.

    Raises:
        FloatingPointError: the loss is not finite; the optimizer has not been stepped.
    """
    denominator = total(weight, engine)
    num_micro = int(largest(len(micro_batches), engine))
    summed = 0.0
    for i in range(num_micro):
        own = i < len(micro_batches)
        loss = loss_of(micro_batches[i] if own else idle)
        scaled = loss * (engine.world_size / denominator if own else 0.0)
        summed += loss.item() if own else 0.0
        engine.backward(scaled)
    mean = total(summed, engine) / denominator
    if not math.isfinite(mean):
        rows = f" on rows {', '.join(names)}" if names else ""
        where = "; this worker's rows are fine" if math.isfinite(summed) else rows
        step = engine.global_steps + 1
        raise FloatingPointError(f"loss is {mean} at step {step}{where}; the last checkpoint is intact")
    engine.step()
    return mean


def gathered(engine: Any, parameters: dict[str, nn.Parameter], device: Any = "cpu") -> dict[str, Tensor]:
    """Copies of some parameters, whole, on rank 0 (empty elsewhere), whatever the ZeRO stage. All ranks take part."""
    from deepspeed.runtime.zero import GatheredParameters

    sharded = engine.zero_optimization_stage() == 3
    with GatheredParameters(list(parameters.values()), enabled=sharded):
        if dist.is_initialized() and dist.get_rank() != 0:
            return {}
        return {name: p.detach().to(device, copy=True) for name, p in parameters.items()}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where this rank holds a shard of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def save(engine: Any, folder: str, position: dict[str, float]) -> None:
    """Write this rank's part of a checkpoint, and where the data stood."""
    engine.save_checkpoint(folder, tag="state", client_state={"position": position}, exclude_frozen_parameters=True)


def load(engine: Any, folder: str) -> dict[str, float]:
    """Restore weights, optimizer, schedule and random state; returns where the data stood.

    Raises:
        FileNotFoundError: the folder holds no checkpoint of this engine.
    """
    path, client_state = engine.load_checkpoint(folder, tag="state", load_module_strict=False)
    if path is None:
        raise FileNotFoundError(f"no training state in {folder}")
    return client_state["position"]
