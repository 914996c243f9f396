"""DeepSpeed engine behind a few verbs: start, step, gather, save, load. The only importer of deepspeed.

One optimizer step is any number of micro-batches. Ranks may have different numbers of rows: a rank without rows takes
part with a zero loss, so that collectives always meet and no row is dropped.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrl.config import TrainingConfig
from rayrl.errors import TrainingStopped
from rayrl.models.quantization import dequantized, dequantized_like
from rayrl.training.fragments import load_fragments, saved_fragments

B = TypeVar("B")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
MAX_SKIPPED_STEPS = 3
"""Steps in a row without a finite gradient that end a training: one may be a bad batch, more are a bad training."""
REMEDY = (
    "look at these rows, lower learning_rate, or raise warmup_ratio; the last checkpoint is intact, and the same "
    "command goes on from it"
)
NUM_NAMED_ROWS = 16
"""Rows that a message names."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Attributes of an engine that a checkpoint keeps."""


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

    skipped_in_a_row: int
    """Steps without a finite gradient since the last one with; ours, and not DeepSpeed's."""

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def get_lr(self) -> list[float]: ...
    def get_global_grad_norm(self) -> float | Tensor | None: ...
    def gradient_clipping(self) -> float: ...
    def zero_optimization_stage(self) -> int: ...
    @property
    def lr_scheduler(self) -> torch.optim.lr_scheduler.LambdaLR: ...


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
        groups: parameters with a learning rate of their own; all others have the training's.
    """
    import deepspeed

    _avoid_compiler()
    _cast_unsharded(model, dtype)
    if training.checkpoints_gradients(sum(described(parameter)[0].numel() for parameter in model.parameters())):
        _checkpoint_gradients(model)
    # Gradients of a sharply peaked softmax are full of denormal numbers, on which a CPU's matrix products run several
    # times slower. Flushed, they are zero; what a step changes by them is far below float32's resolution.
    torch.set_flush_denormal(True)
    os.environ.setdefault("LOCAL_RANK", "0")

    dealt = _dealt(model, training.learning_rate, groups)

    def factor_of(group: ParameterGroup) -> Callable[[int], float]:
        # A learning rate of 0, and no gradient of 0: Adam's moments are then those of real gradients when it ends.
        waiting = group.num_waiting_steps
        return lambda step: 0.0 if step < waiting else schedule(step - waiting, num_steps - waiting, training)

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor_of(group) for group in dealt])

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": group.parameters, "lr": group.learning_rate} for group in dealt],  # type: ignore[arg-type]
        config=zero_config(training, dtype),
        optimizer=partial(new_optimizer, training=training),  # type: ignore[arg-type]
        lr_scheduler=scheduler,  # type: ignore[arg-type]
        dist_init_required=False,
    )
    engine.skipped_in_a_row = 0  # type: ignore[assignment]  # the engine is a torch module, which types attributes
    # Without ZeRO and in float32, DeepSpeed leaves clipping to torch: a gradient that is not finite would turn all
    # weights into NaN, and its norm is nowhere to be read.
    engine.clip_fp32_gradients = partial(_clip_or_skip, engine)
    return cast("Engine[M]", engine)


def _dealt(model: nn.Module, learning_rate: float, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """Deal all parameters that are trained to groups, those without one of their own first."""
    apart = {id(parameter) for group in groups for parameter in group.parameters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    trained: list[ParameterGroup] = []
    for group in (ParameterGroup(parameters=others, learning_rate=learning_rate), *groups):
        parameters = [parameter for parameter in group.parameters if parameter.requires_grad]
        if parameters:
            trained.append(replace(group, parameters=parameters))
    return trained


def _clip_or_skip(engine: Any) -> None:
    """Clip whole gradients and keep their norm; without a finite one drop them, which the optimizer passes over."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping()).item()
    engine._global_grad_norm = norm
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None


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
    # Without an optimizer, which a config does not name, DeepSpeed wraps a model to be read.
    config["zero_optimization"] = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if offload else {})
    with _sharded_by(config):
        model = load()
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


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


def scattered(parts: Sequence[T] | None) -> T:
    """Send each rank its part of a list that rank 0 has; the others give None. All ranks take part."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert parts is not None
        return parts[0]
    received: list[T | None] = [None]
    dist.scatter_object_list(received, None if parts is None else list(parts), src=0)
    return cast("T", received[0])


def gathered(part: T) -> list[T]:
    """Return the parts of all ranks, in their order, to every rank. All ranks take part."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [part]
    parts: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return cast("list[T]", parts)


def barrier(engine: Engine) -> None:
    """Wait until every rank is here."""
    max_over_ranks(0.0, engine)


def _reduce(value: float, engine: Engine, operation: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=engine.device)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor.item()


class StepResult(NamedTuple):
    """An optimizer step as the training's curve shows it."""

    loss: float
    """Mean over all ranks."""
    grad_norm: float
    """Length of the gradient of all ranks before it was clipped; not finite if the step was skipped."""
    num_skipped: int
    """1 if the gradient was not finite, so that the weights are as before the step; else 0."""


def train_step(
    engine: Engine,
    micro_batches: Sequence[B],
    summed_loss: Callable[[B], Tensor],
    weight: float,
    idle: B,
    names: Sequence[str] = (),
) -> StepResult:
    """Take one optimizer step on the mean loss over all ranks; a step without a finite gradient changes no weights.

    Args:
        engine: the DeepSpeed engine.
        micro_batches: this rank's micro-batches; may be empty, and differ in number between ranks.
        summed_loss: sum of the losses of a micro-batch's samples.
        weight: this rank's share of the mean's denominator (samples, or tokens).
        idle: a micro-batch to run at zero weight while other ranks still work.
        names: this rank's rows, for the message when they break the training.

    Raises:
        TrainingStopped: the loss is not finite, or for the third time in a row the gradient; on all ranks alike, and
            the optimizer has not been stepped.
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
    step = engine.global_steps + 1
    if not math.isfinite(mean):
        rows = _named([] if math.isfinite(own_loss) else names)
        raise TrainingStopped(f"the loss is {mean} at step {step}{rows}; {REMEDY}")
    engine.step()
    grad_norm = engine.get_global_grad_norm()
    assert grad_norm is not None, "every optimizer computes it"
    grad_norm = float(grad_norm)
    is_skipped = not math.isfinite(grad_norm)
    engine.skipped_in_a_row = engine.skipped_in_a_row + 1 if is_skipped else 0
    if engine.skipped_in_a_row == MAX_SKIPPED_STEPS:
        raise TrainingStopped(
            f"the gradient is not finite in {MAX_SKIPPED_STEPS} steps in a row, the last of them step {step}"
            f"{_named(names)}, although the loss is ({mean:.4g}); these steps were skipped; {REMEDY}"
        )
    _forget_gradients(engine)
    return StepResult(mean, grad_norm, int(is_skipped))


def _named(names: Sequence[str]) -> str:
    """Name the given rows of all ranks for a message. All ranks take part."""
    everywhere = [name for of_rank in gathered(list(names)) for name in of_rank]
    if not everywhere:
        return ""
    more = f" and {len(everywhere) - NUM_NAMED_ROWS} more" if len(everywhere) > NUM_NAMED_ROWS else ""
    return f" on rows {', '.join(everywhere[:NUM_NAMED_ROWS])}{more}"


def has_finite_weights(engine: Engine[nn.Module]) -> bool:
    """Tell whether every trained weight is a finite number, on all ranks, all of which take part."""
    is_broken = False
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            is_broken |= not bool(_own_part(parameter).isfinite().all())
    return max_over_ranks(is_broken, engine) == 0


def _own_part(parameter: Any) -> Tensor:
    """Return a parameter, or under ZeRO-3 this rank's shard of it, flat and without its padding.

    The last shards are padded to the length of the others with memory as it was, which may hold any number.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    shard: Tensor = parameter.ds_tensor.detach()
    num_left = parameter.ds_numel - dist.get_rank(parameter.ds_process_group) * shard.numel()
    return shard[: max(0, num_left)]


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
    """Copy some parameters whole to rank 0, whatever the ZeRO stage; other ranks get nothing. All ranks take part.

    Weights in 4 bits are copied as what they stand for.
    """
    from deepspeed.runtime.zero import GatheredParameters

    is_sharded = engine.zero_optimization_stage() == 3
    with GatheredParameters(list(parameters.values()), enabled=is_sharded):
        if dist.is_initialized() and dist.get_rank() != 0:
            return {}
        return {name: dequantized(p).detach().to(device, copy=True) for name, p in parameters.items()}


def described(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype]:
    """Return shape and type of what `gather` makes of a parameter, also where this rank holds a shard of it."""
    shape, dtype = dequantized_like(parameter)
    return torch.Size(getattr(parameter, "ds_shape", shape)), dtype


def save(engine: Engine, folder: str, position: dict[str, float]) -> Callable[[], None]:
    """Copy this rank's part of a checkpoint, with the position in the data, into memory.

    Returns:
        Writes the copy into the folder; may run in another thread while training goes on. Where memory has no room for
        the copies of all ranks, everything is written already.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    state = {
        # Plain numbers, which torch reads without running code; numpy's are not.
        "position": {name: float(value) for name, value in position.items()},
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "schedule": engine.lr_scheduler.state_dict(),
        "fragments": saved_fragments(engine),
    }
    file = Path(folder, f"part-{rank}-of-{world_size}.pt")
    # Of the ranks on this machine, none of which knows what the others copy.
    if num_bytes(state) >= _free_memory() // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        torch.save(state, file)
        return lambda: None
    copy = copied(state)

    def write() -> None:
        torch.save(copy, file)
        copy.clear()  # the caller may keep this function for longer than the memory is to be taken

    return write


def _free_memory() -> int:
    """Return the bytes that this machine, or the container that limits it, has left."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if not limit.exists() or not (allowed := limit.read_text().strip()).isdigit():
        return free
    counts = dict(line.split() for line in used.read_text().splitlines())
    return min(free, int(allowed) - int(counts["anon"]) - int(counts["shmem"]))


def copied(state: Any) -> Any:
    """Copy all tensors in nested containers into the machine's memory; other values stay as they are."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in cast("dict[Any, Any]", state).items()}
    if type(state) in (list, tuple):
        return type(state)(copied(value) for value in state)
    return state


def num_bytes(state: Any) -> int:
    """Count the bytes of all tensors in nested containers."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(num_bytes(value) for value in cast("dict[Any, Any]", state).values())
    if type(state) in (list, tuple):
        return sum(num_bytes(value) for value in state)
    return 0


def load(engine: Engine, folder: str) -> dict[str, float]:
    """Restore weights, optimizer and schedule, and return the position in the data. All ranks take part.

    The ranks that wrote the checkpoint may have been more or fewer, with another ZeRO stage, on GPUs or not.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    # Mapped: a rank reads no more of the others' parts than lies in its own.
    parts = [
        torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in Path(folder).glob("part-*.pt")
    ]
    if not parts:
        raise FileNotFoundError(f"no training state in {folder}")
    load_fragments(engine, [fragment for part in parts for fragment in part["fragments"]])
    part = parts[0]
    for name in COUNTERS:
        setattr(engine, name, part["counters"][name])
    scheduler = engine.lr_scheduler
    scheduler.load_state_dict(part["schedule"])
    for group, learning_rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    return part["position"]
