"""DeepSpeed engine behind a few verbs: start, step, gather, save, load. The only importer of deepspeed.

One optimizer step is any number of micro-batches. Ranks may have different numbers of rows: a rank without rows takes
part with a zero loss, so that collectives always meet and no row is dropped.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrl.config import TrainingConfig

B = TypeVar("B")
M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
TAG = "state"
"""DeepSpeed's name for the folder of a checkpoint inside ours."""


class Engine(Protocol[M_co]):
    """The part of a `deepspeed.DeepSpeedEngine` that is used here, around a module. Calling it calls the module."""

    @property
    def module(self) -> M_co: ...
    @property
    def optimizer(self) -> object: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def world_size(self) -> int: ...
    @property
    def global_steps(self) -> int: ...
    def __call__(self, *inputs: Any, **named: Any) -> Any: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def get_lr(self) -> list[float]: ...
    def zero_optimization_stage(self) -> int: ...
    def save_checkpoint(
        self, save_dir: str, *, tag: str, client_state: dict[str, Any], exclude_frozen_parameters: bool
    ) -> object: ...
    def load_checkpoint(
        self, load_dir: str, *, tag: str, load_module_strict: bool
    ) -> tuple[str | None, dict[str, Any]]: ...


def zero_config(training: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Translate the training's settings to DeepSpeed's, and add those that the user passes through."""
    stage = training.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if training.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step ends where `train_step` ends it: the number of micro-batches changes from step to step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype != torch.float32 and training.grad_accum_dtype == "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        zero["stage"] = max(1, stage)  # stage 0 has one type for weights and gradients
    return _merged(config, training.deepspeed)


def _merged(config: dict[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Add settings to a config, table by table."""
    merged = dict(config)
    for name, value in added.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


@contextmanager
def sharded_loading(training: TrainingConfig, dtype: torch.dtype) -> Iterator[None]:
    """Within it, `from_pretrained` shards a model over the ranks as it loads, if the training is ZeRO-3."""
    if training.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    _avoid_compiler()
    # transformers keeps a weak reference only: models are sharded for as long as this object is alive.
    config = HfDeepSpeedConfig(zero_config(training, dtype))
    try:
        yield
    finally:
        del config


def start(model: M, training: TrainingConfig, dtype: torch.dtype, num_steps: int) -> Engine[M]:
    """Wrap a model for training over all workers of the fit.

    Args:
        model: what is trained; its frozen parameters stay as they are.
        training: optimizer, schedule and sharding.
        dtype: precision of the weights.
        num_steps: length of the learning-rate schedule.
    """
    import deepspeed

    _avoid_compiler()
    _cast_unsharded(model, dtype)
    if training.checkpoints_gradients(sum(full_shape(parameter).numel() for parameter in model.parameters())):
        _checkpoint_gradients(model)
    # Gradients of a sharply peaked softmax are full of denormal numbers, on which a CPU's matrix products run several
    # times slower. Flushed, they are zero; what a step changes by them is far below float32's resolution.
    torch.set_flush_denormal(True)
    os.environ.setdefault("LOCAL_RANK", "0")

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, num_steps, training))

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],  # type: ignore[arg-type]
        config=zero_config(training, dtype),
        optimizer=partial(new_optimizer, training=training),  # type: ignore[arg-type]
        lr_scheduler=scheduler,  # type: ignore[arg-type]
        dist_init_required=False,
    )
    return cast("Engine[M]", engine)


def new_optimizer(parameters: list[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """Make torch's own AdamW, on GPUs and CPUs: DeepSpeed's are compiled at their first use, and need a compiler."""
    return torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _cast_unsharded(model: nn.Module, dtype: torch.dtype) -> None:
    """Give heads and adapters, which are float32 when they are made, the precision of the weights that they sit on.

    DeepSpeed casts them itself below ZeRO-3. There it shards what it finds, and refuses trained parameters of two
    types. Their float32 copies, which the optimizer steps, are DeepSpeed's in either case.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _checkpoint_gradients(model: nn.Module) -> None:
    """Turn gradient checkpointing on in the outermost module that offers it, which passes it on to those below."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
            return


def _avoid_compiler() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce when it first meets the process group on a CPU.

    That takes minutes, a C++ compiler, and a lock file that a killed process leaves for ever. gloo reduces as well.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def schedule(step: int, num_steps: int, training: TrainingConfig) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then constant, linear or cosine."""
    num_warmup = math.ceil(training.warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    least = training.min_learning_rate_share
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    if training.schedule == "linear":
        return 1.0 - (1 - least) * progress
    if training.schedule == "cosine":
        return least + (1 - least) / 2 * (1 + math.cos(math.pi * progress))
    return 1.0


def sum_over_ranks(value: float, engine: Engine) -> float:
    """Sum a number over the ranks, all of which take part."""
    return _reduce(value, engine, dist.ReduceOp.SUM)


def max_over_ranks(value: float, engine: Engine) -> float:
    """Return the largest of a number over the ranks, all of which take part."""
    return _reduce(value, engine, dist.ReduceOp.MAX)


def sum_tensor_over_ranks(tensor: Tensor, engine: Engine) -> Tensor:
    """Sum a tensor elementwise over the ranks, all of which take part."""
    if not dist.is_initialized():
        return tensor
    on_device = tensor.to(engine.device)
    dist.all_reduce(on_device, dist.ReduceOp.SUM)
    return on_device.to(tensor.device)


def barrier(engine: Engine) -> None:
    """Wait until every rank is here."""
    max_over_ranks(0.0, engine)


def _reduce(value: float, engine: Engine, operation: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=engine.device)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor.item()


def train_step(
    engine: Engine,
    micro_batches: Sequence[B],
    summed_loss: Callable[[B], Tensor],
    weight: float,
    idle: B,
    names: Sequence[str] = (),
) -> float:
    """Take one optimizer step on the mean loss over all ranks.

    Args:
        engine: the DeepSpeed engine.
        micro_batches: this rank's micro-batches; may be empty, and differ in number between ranks.
        summed_loss: sum of the losses of a micro-batch's samples.
        weight: this rank's share of the mean's denominator (samples, or tokens).
        idle: a micro-batch to run at zero weight while other ranks still work.
        names: this rank's rows, for the message when they break the loss.

    Returns:
        The mean loss.

    Raises:
        FloatingPointError: the loss is not finite; the optimizer has not been stepped.
    """
    denominator = sum_over_ranks(weight, engine)
    num_micro = int(max_over_ranks(len(micro_batches), engine))
    own_loss = 0.0
    for i in range(num_micro):
        if i < len(micro_batches):
            loss = summed_loss(micro_batches[i])
            own_loss += loss.item()
            # DeepSpeed averages gradients over the ranks; the factor makes that a sum.
            factor = engine.world_size / denominator
        else:
            loss = summed_loss(idle)
            factor = 0.0
        engine.backward(loss * factor)
    mean = sum_over_ranks(own_loss, engine) / denominator
    if not math.isfinite(mean):
        rows = f" on rows {', '.join(names)}" if names else ""
        where = "; this worker's rows are fine" if math.isfinite(own_loss) else rows
        step = engine.global_steps + 1
        raise FloatingPointError(f"loss is {mean} at step {step}{where}; the last checkpoint is intact")
    engine.step()
    _forget_gradients(engine)
    return mean


def _forget_gradients(engine: Engine) -> None:
    """Zero the gradients of the step that was taken, where ZeRO-3 keeps them.

    DeepSpeed overwrites them in the first backward pass of the next step only: to a parameter that has no part in that
    pass (a head, beside views that do not read it) it would add the old gradient again.
    """
    gradients = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if gradients is not None:
        gradients.zero_()


def gather(
    engine: Engine, parameters: Mapping[str, nn.Parameter], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Copy some parameters whole to rank 0, whatever the ZeRO stage; other ranks get nothing. All ranks take part."""
    from deepspeed.runtime.zero import GatheredParameters

    is_sharded = engine.zero_optimization_stage() == 3
    with GatheredParameters(list(parameters.values()), enabled=is_sharded):
        if dist.is_initialized() and dist.get_rank() != 0:
            return {}
        return {name: p.detach().to(device, copy=True) for name, p in parameters.items()}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, also where this rank holds a shard of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def save(engine: Engine, folder: str, position: dict[str, float]) -> None:
    """Write this rank's part of a checkpoint, with the position in the data."""
    engine.save_checkpoint(folder, tag=TAG, client_state={"position": position}, exclude_frozen_parameters=True)


def load(engine: Engine, folder: str) -> dict[str, float]:
    """Restore weights, optimizer, schedule and random state, and return the position in the data.

    Raises:
        FileNotFoundError: the folder holds no checkpoint of this engine.
    """
    # Not strict: frozen parameters are not in the checkpoint.
    path, client_state = engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
    if path is None:
        raise FileNotFoundError(f"no training state in {folder}")
    return client_state["position"]
