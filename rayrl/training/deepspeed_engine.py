"""DeepSpeed engine behind a few verbs: start, step, gather, save, load. The only importer of deepspeed.

One optimizer step is any number of micro-batches. Ranks may have different numbers of rows: a rank without rows takes
part with a zero loss, so that collectives always meet and no row is dropped.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrl.config import TrainingConfig

B = TypeVar("B")
M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
LEAST_SHARE = 0.1
"""Share of the learning rate that the schedules "linear" and "cosine" end at."""
TAG = "state"
"""DeepSpeed's name for the folder of a checkpoint inside ours."""


class Engine(Protocol[M_co]):
    """The part of a `deepspeed.DeepSpeedEngine` that is used here, around a module. Calling it calls the module."""

    @property
    def module(self) -> M_co: ...
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
    """Translate the training's settings to DeepSpeed's."""
    zero: dict[str, int | dict[str, str]] = {"stage": training.zero_stage}
    if training.cpu_offload and training.zero_stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu"}
        if training.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step ends where `train_step` ends it: the number of micro-batches changes from step to step.
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


@contextmanager
def sharded_loading(training: TrainingConfig, dtype: torch.dtype) -> Iterator[None]:
    """Within it, `from_pretrained` shards a model over the ranks as it loads, if the training is ZeRO-3."""
    if training.zero_stage != 3:
        yield
        return
    with _sharded_by(zero_config(training, dtype)):
        yield


@contextmanager
def _sharded_by(config: dict[str, Any]) -> Iterator[None]:
    """Within it, `from_pretrained` shards a model over the ranks as it loads, as a configuration of ZeRO-3 has it."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    _avoid_compiler()
    # transformers keeps a weak reference only: models are sharded for as long as this object is alive.
    sharding = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del sharding


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with a learning rate of their own; the schedule is the training's."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    """Highest learning rate, reached after the warm-up."""
    num_waiting_steps: int = 0
    """Steps at the start in which the parameters stay as they are; their schedule begins after them."""


def start(
    model: M,
    training: TrainingConfig,
    dtype: torch.dtype,
    num_steps: int,
    groups: Sequence[ParameterGroup] = (),
) -> Engine[M]:
    """Wrap a model for training over all workers of the fit.

    Args:
        model: what is trained; its frozen parameters stay as they are.
        training: optimizer, schedule and sharding.
        dtype: precision of the weights.
        num_steps: length of the learning-rate schedule.
        groups: all of the model's parameters, dealt to groups; without them there is one, with the training's learning
            rate.
    """
    import deepspeed

    _avoid_compiler()
    if training.gradient_checkpointing:
        _checkpoint_gradients(model)
    # Gradients of a sharply peaked softmax are full of denormal numbers, on which a CPU's matrix products run several
    # times slower. Flushed, they are zero; what a step changes by them is far below float32's resolution.
    torch.set_flush_denormal(True)
    os.environ.setdefault("LOCAL_RANK", "0")

    if not groups:
        groups = [ParameterGroup(parameters=list(model.parameters()), learning_rate=training.learning_rate)]

    def factor_of(group: ParameterGroup) -> Callable[[int], float]:
        # A learning rate of 0, and no gradient of 0: Adam's moments are then those of real gradients when it ends.
        waiting = group.num_waiting_steps
        return lambda step: 0.0 if step < waiting else schedule(step - waiting, num_steps - waiting, training)

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor_of(group) for group in groups])

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[
            {"params": [p for p in group.parameters if p.requires_grad], "lr": group.learning_rate} for group in groups
        ],  # type: ignore[arg-type]
        config=zero_config(training, dtype),
        lr_scheduler=scheduler,  # type: ignore[arg-type]
        dist_init_required=False,
    )
    return cast("Engine[M]", engine)


def start_frozen(
    load: Callable[[], nn.Module], training: TrainingConfig, dtype: torch.dtype, *, offload: bool
) -> nn.Module:
    """Load a model that is only read, sharded over the ranks by ZeRO-3. Each of its passes is a collective.

    Args:
        load: loads the model.
        training: its sharding.
        dtype: precision of the weights.
        offload: keep the shards in the machine's memory.
    """
    import deepspeed

    config = zero_config(training, dtype)
    # Without an optimizer DeepSpeed wraps a model to be read.
    del config["optimizer"]
    config["zero_optimization"] = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if offload else {})
    with _sharded_by(config):
        model = load()
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


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
    """Return the factor of the learning rate at a step: linear warm-up, then constant, linear or cosine to a tenth."""
    num_warmup = math.ceil(training.warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    if training.schedule == "linear":
        return 1.0 - (1 - LEAST_SHARE) * progress
    if training.schedule == "cosine":
        return LEAST_SHARE + (1 - LEAST_SHARE) / 2 * (1 + math.cos(math.pi * progress))
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
    return mean


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
