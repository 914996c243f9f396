"""Resource needs of trainings and fleets, and their comparison with the cluster.

CPUs: a training worker reserves one, an engine the number in its config (0 by default), an oracle none. One CPU must
stay free for Ray Data, which otherwise waits for ever without a word. GPUs: a training worker takes a whole one, an
engine the number in its config, all of it on one node. Memory, estimated in `rayrl.preflight.memory`: of one process
against the largest GPU, where its size is known; without GPUs of all processes against the nodes' memory. A fleet that
may grow is planned at its largest: it must not take what a training needs. The cluster counts as large as its
autoscaler may make it.

This module knows no stage: which trainings and fleets are up at the same time is decided in
`rayrl.preflight.stage_plans`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrl.config import EngineConfig, LoraConfig, RunConfig, TrainingConfig
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.memory import (
    CPU_PROCESS_BYTES,
    DTYPE_BYTES,
    GIB,
    EngineSettings,
    Memory,
    ModelShape,
    Networks,
    RoleMemory,
    TrainerSettings,
    engine_memory,
    most_share,
    trainer_memory,
)
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.plan import GpuShare, Needs, StagePlan, Whole
from rayrl.runs.stage_table import FleetUse, Training

FREE_CPUS = 1
"""Left to Ray Data."""
MOST_WORKERS = 8
"""Of a training, in a refusal's remedy."""
SMALL_MICRO_BATCH = 2048
"""Tokens of a micro-batch, in a refusal's remedy."""
MOST_OPTIONS = 4
"""Settings that a refusal names as its remedy."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run's engines and trainings are, and what their memory is estimated from."""

    on_gpu: bool
    dtype: str
    num_gpus: float
    """Of the cluster, grown as far as it may."""
    gpu_bytes: float | None
    """Memory of its largest GPU; None is unknown."""
    shape: ModelShape | None
    """Sizes of the policy; None estimates nothing."""
    max_model_len: int | None

    @property
    def width(self) -> int:
        """Bytes of a parameter."""
        return DTYPE_BYTES[self.dtype]


def resolved_dtype(config: RunConfig, cluster: Cluster) -> str:
    """Return the dtype of engines and trainings on this cluster."""
    on_gpu = cluster.most("GPU") > 0
    return config.policy.resolved_dtype(on_gpu=on_gpu, has_bfloat16=cluster.has_bfloat16())


def place_of(config: RunConfig, cluster: Cluster, model: ModelFacts) -> Place:
    """Gather what the needs of stages depend on, besides the config."""
    num_gpus = cluster.most("GPU")
    return Place(
        on_gpu=num_gpus > 0,
        dtype=resolved_dtype(config, cluster),
        num_gpus=num_gpus,
        gpu_bytes=cluster.gpu_bytes(),
        shape=model.shape,
        max_model_len=model.max_model_len,
    )


def training_needs(training: Training, config: RunConfig, *, place: Place) -> Needs:
    """Needs of the workers of one training."""
    settings = training.settings
    num_workers = settings.num_workers
    lora = "" if settings.lora is None else ", LoRA" if settings.lora.quantization is None else ", QLoRA"
    return Needs(
        actors=f"{num_workers} worker(s), ZeRO-{settings.zero_stage}{lora}",
        num_gpus=num_workers if place.on_gpu else 0,
        num_cpus=num_workers,
        memory=_training_memory(training, config, place),
        setting=f"{training.section}.num_workers",
    )


def _training_memory(training: Training, config: RunConfig, place: Place) -> tuple[RoleMemory, ...]:
    shape = place.shape
    if shape is None:
        return ()
    is_scalar = training.section == "evaluator" and config.evaluator.type == "scalar"
    networks = Networks(
        has_value=training.samples and config.ppo.trains_value,
        has_reference=training.samples and training.settings.lora is None,
        has_logits=training.section != "reward_model" and not is_scalar,
    )

    def estimate(settings: TrainerSettings) -> Memory:
        return trainer_memory(shape, settings, networks, width=place.width, on_gpu=place.on_gpu)

    settings = _trainer_settings(training.settings, place)
    options: list[tuple[str, float]] = []
    for changes in _smaller(settings, place):
        lines = " and ".join(f"{training.section}.{name} = {toml(value)}" for name, value in changes.items())
        options.append((lines, estimate(replace(settings, **changes)).total))
    memory = estimate(settings)
    return (
        RoleMemory(
            role="trainer",
            num_processes=settings.num_workers,
            memory=memory,
            least=memory.total,
            options=tuple(options),
        ),
    )


def _trainer_settings(training: TrainingConfig, place: Place) -> TrainerSettings:
    num_tokens = training.micro_batch_tokens
    if place.max_model_len is not None:
        # A worker's rows may be fewer than fill a micro-batch. A pair has two of them.
        num_rows = 2 * math.ceil(training.batch_size / training.num_workers)
        num_tokens = min(num_tokens, num_rows * place.max_model_len)
    is_widened = place.width < 4 and training.grad_accum_dtype == "float32"
    num_parameters = 0 if place.shape is None else place.shape.num_parameters
    return TrainerSettings(
        num_workers=training.num_workers,
        # DeepSpeed adds gradients up in another precision than the weights' from ZeRO-1 on.
        zero_stage=max(1, training.zero_stage) if is_widened else training.zero_stage,
        cpu_offload=training.cpu_offload,
        gradient_checkpointing=training.checkpoints_gradients(num_parameters),
        lora=training.lora,
        micro_batch_tokens=num_tokens,
        gradient_width=4 if is_widened else place.width,
    )


def _smaller(settings: TrainerSettings, place: Place) -> list[dict[str, Any]]:
    """Changes of a training's settings that need less memory, those that cost least first; all together last."""
    changes: list[dict[str, Any]] = []
    if not settings.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if settings.micro_batch_tokens > SMALL_MICRO_BATCH:
        changes.append({"micro_batch_tokens": SMALL_MICRO_BATCH})
    num_workers = int(max(settings.num_workers, min(place.num_gpus, MOST_WORKERS)))
    if settings.zero_stage < 3 and num_workers > 1:
        more = {} if num_workers == settings.num_workers else {"num_workers": num_workers}
        changes.append({**more, "zero_stage": 3})
    if place.on_gpu and not settings.cpu_offload:
        changes.append({"zero_stage": 3, "cpu_offload": True})
    if settings.lora is None:
        changes.append({"lora": LoraConfig()})
    if num_workers == 1 and (settings.lora is None or settings.lora.quantization is None):
        changes.append({"zero_stage": min(settings.zero_stage, 2), "lora": LoraConfig(quantization="nf4")})
    together = {name: value for change in changes for name, value in change.items()}
    return [*changes, together] if len(changes) > 1 else changes


def toml(value: object) -> str:
    """Write a setting's value as a config has it."""
    if isinstance(value, LoraConfig):
        quantization = "" if value.quantization is None else f', quantization = "{value.quantization}"'
        return f"{{ rank = {value.rank}{quantization} }}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fleet_needs(fleet: FleetUse, config: RunConfig, *, place: Place) -> Needs:
    """Needs of all replicas of one fleet.

    Raises:
        ConfigError: a replica's share of GPUs is neither at most 1 nor whole.
    """
    on_gpu = place.on_gpu
    if fleet.role == "entailment":
        return _entailment_needs(config, on_gpu=on_gpu)
    engine = config.generators if fleet.role == "generators" else config.embedders
    kind = "generator" if fleet.role == "generators" else "embedder"
    limit = "num_replicas" if engine.max_replicas is None else "max_replicas"
    # Embedders may serve another model than the policy, of which nothing is known.
    serves_policy = fleet.model == "policy"
    return Needs(
        actors=f"{engine.most} {kind}(s)",
        num_gpus=num_fleet_gpus(engine, fleet.role) if on_gpu else 0,
        num_cpus=0 if on_gpu else math.ceil(engine.most * engine.cpus_per_replica),
        memory=_engine_memory(fleet.role, engine, place) if serves_policy else (),
        gpu_shares=_gpu_shares(fleet.role, engine) if on_gpu else (),
        whole=_whole(engine, fleet.role, on_gpu=on_gpu),
        setting=f"{fleet.role}.{limit}",
    )


def _engine_memory(role: str, engine: EngineConfig, place: Place) -> tuple[RoleMemory, ...]:
    shape = place.shape
    if shape is None:
        return ()

    settings = EngineSettings(
        tensor_parallel_size=engine.tensor_parallel_size,
        pipeline_parallel_size=engine.pipeline_parallel_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_mb=engine.kv_cache_mb,
        max_model_len=place.max_model_len or 0,
    )

    def estimate(settings: EngineSettings, gpu_bytes: float | None) -> Memory:
        return engine_memory(shape, settings, width=place.width, gpu_bytes=gpu_bytes, on_gpu=place.on_gpu)

    options: list[tuple[str, float]] = []
    for size in (2, 4, 8):
        if engine.tensor_parallel_size < size <= place.num_gpus:
            larger = replace(settings, tensor_parallel_size=size)
            options.append((f"{role}.tensor_parallel_size = {size}", estimate(larger, None).total))
    return (
        RoleMemory(
            role=role,
            num_processes=engine.most * engine.num_ranks,
            memory=estimate(settings, place.gpu_bytes),
            least=estimate(settings, None).total,
            share=engine.gpu_memory_utilization,
            options=tuple(options),
        ),
    )


def _gpu_shares(role: str, engine: EngineConfig) -> tuple[GpuShare, ...]:
    if engine.num_gpus >= 1:
        return ()
    return (
        GpuShare(
            role=role,
            num_replicas=engine.most,
            fraction=engine.num_gpus,
            memory_share=engine.gpu_memory_utilization,
        ),
    )


def _entailment_needs(config: RunConfig, *, on_gpu: bool) -> Needs:
    """Needs of the entailment model's replicas. Each has an embedder's share of a GPU, and no parallel ranks."""
    num_replicas = config.refresh.spg.num_replicas
    replicas = EngineConfig(num_replicas=num_replicas, gpus_per_replica=config.embedders.gpus_per_replica)
    return Needs(
        actors=f"{num_replicas} entailment model(s)",
        num_gpus=num_fleet_gpus(replicas, "embedders") if on_gpu else 0,
        setting="refresh.spg.num_replicas",
    )


def num_fleet_gpus(engine: EngineConfig, section: str) -> int:
    """Whole GPUs a fleet occupies: a replica never straddles two of them.

    Raises:
        ConfigError: a replica's share is neither at most 1 nor whole.
    """
    each = engine.num_gpus
    if each > 1 and each != int(each):
        raise ConfigError(
            f"{section}.gpus_per_replica x tensor_parallel_size x pipeline_parallel_size must be at most 1 or whole, "
            f"got {each:g}; change one of the three"
        )
    if each >= 1:
        return engine.most * int(each)
    if each <= 0:  # engines that share GPUs with whatever else is there
        return 0
    # The tolerance keeps 1 / 0.1 = 9.99... from being 9 replicas on a GPU.
    replicas_per_gpu = math.floor(1 / each + 1e-9)
    return math.ceil(engine.most / replicas_per_gpu)


def _whole(engine: EngineConfig, section: str, *, on_gpu: bool) -> tuple[Whole, ...]:
    """Compute what a replica must find on one node. Ray keeps more than one GPU together by a placement group."""
    if not on_gpu:
        return (Whole(resource="CPU", amount=engine.cpus_per_replica, setting=f"{section}.cpus_per_replica"),)
    if engine.num_gpus <= 1:
        return ()
    sizes = f"{section}.tensor_parallel_size or {section}.pipeline_parallel_size"
    return (Whole(resource="GPU", amount=engine.num_gpus, setting=sizes),)


def at_once(leading: Sequence[Needs], beside: Sequence[Needs], *, name: str, what: str, remedy: str = "") -> StagePlan:
    """Add up needs that exist at the same time.

    Args:
        leading: the training or the fleets that the stage is about; none for a stage of the driver alone.
        beside: the fleets that are up meanwhile.
        name: of the stage.
        what: text of the stage's row.
        remedy: added to the settings to lower, where fleets are beside.
    """
    parts = [*leading, *beside]
    whole: list[Whole] = []
    settings: list[str] = []
    for part in parts:
        whole += part.whole
        # Two fleets of embedders are sized by one setting.
        if part.setting not in settings:
            settings.append(part.setting)
    actors = _join_actors(leading)
    setting = " or ".join(settings)
    if beside:
        actors += f", beside {_join_actors(beside)}"
        setting += remedy
    return StagePlan(
        name=name,
        what=what,
        actors=actors,
        num_gpus=sum(part.num_gpus for part in parts),
        num_cpus=sum(part.num_cpus for part in parts),
        memory=tuple(role for part in parts for role in part.memory),
        gpu_shares=tuple(share for part in parts for share in part.gpu_shares),
        whole=tuple(whole),
        setting=setting,
    )


def _join_actors(parts: Sequence[Needs]) -> str:
    return " and ".join(part.actors for part in parts)


def lacking(needs: Needs, cluster: Cluster) -> str | None:
    """The first resource of which the cluster has, and may get, too little; None if it has enough of all.

    Returns:
        Resource, amount needed, amount present, and the remedy, for a message.
    """
    remedy = f"lower {needs.setting}, or use a larger cluster" if needs.setting else "use a larger machine or cluster"
    if needs.num_gpus > cluster.most("GPU"):
        return f"GPU: {needs.num_gpus:g}, and the cluster has {cluster.describe('GPU')}; {remedy}"
    if needs.num_cpus + FREE_CPUS > cluster.most("CPU"):
        return (
            f"CPU: {needs.num_cpus} and {FREE_CPUS} free for Ray Data, and the cluster has "
            f"{cluster.describe('CPU')}; {remedy}"
        )
    for part in needs.whole:
        largest = cluster.largest(part.resource)
        if part.amount > largest:
            return (
                f"{part.resource}: {part.amount:g} on one node, and the largest that there is, or may be, has "
                f"{largest:g}; lower {part.setting}, or use larger nodes"
            )
    if needs.num_gpus > 0:
        return _lacking_on_gpus(needs, cluster)
    # Processes without a model, object store and caches come on top: this refuses only what is certain to fail.
    num_bytes = sum(role.num_processes * (role.memory.total - CPU_PROCESS_BYTES) for role in needs.memory)
    memory = cluster.memory()
    if num_bytes > memory:
        (first, *others) = needs.memory
        helps = "" if others else _helps(needs.memory, memory / first.num_processes + CPU_PROCESS_BYTES)
        return (
            f"memory: about {num_bytes / GIB:,.1f} GiB ({_described(needs.memory)}), and the cluster has, or may get, "
            f"{memory / GIB:,.1f} GiB; {helps or remedy}"
        )
    return None


def _lacking_on_gpus(needs: Needs, cluster: Cluster) -> str | None:
    """Like `lacking`, for the memory of GPUs, and for that of the nodes where states are kept beside them."""
    if needs.gpu_shares:
        fleets = [(share.fraction, share.num_replicas, share.memory_share) for share in needs.gpu_shares]
        total = most_share(fleets)
        if total > 1 + 1e-9:
            names = " and ".join(dict.fromkeys(f"{share.role}.gpu_memory_utilization" for share in needs.gpu_shares))
            return (
                f"shares of one GPU's memory that add up to {total:g}, where replicas with fractions of a GPU are "
                f"together, and vLLM counts {names} as a share of the whole GPU for each replica: a sum above 1 does "
                "not start; lower it, or raise gpus_per_replica"
            )
    gpu_bytes = cluster.gpu_bytes()
    if gpu_bytes is not None:
        for role in needs.memory:
            room = role.share * gpu_bytes
            if role.least > room:
                may_take = f", of which it may take {room / GIB:,.1f}" if role.share < 1 else ""
                return (
                    f"GPU memory: about {role.least / GIB:,.1f} GiB for each {_described((role,))}, and the largest "
                    f"GPU has {gpu_bytes / GIB:,.1f} GiB{may_take}; {_helps((role,), room) or 'use larger GPUs'}"
                )
    host = sum(role.num_processes * role.memory.host for role in needs.memory)
    if host > cluster.memory():
        return (
            f"memory: about {host / GIB:,.1f} GiB beside the GPUs, where cpu_offload keeps the optimizer's state, and "
            f"the cluster has, or may get, {cluster.memory() / GIB:,.1f} GiB; shard it over more workers, or set lora"
        )
    return None


def _described(roles: Sequence[RoleMemory]) -> str:
    """List the processes of roles, with the terms of one in GiB."""
    parts: list[str] = []
    for role in roles:
        terms = ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in role.memory.terms.items() if amount)
        parts.append(f"{role.num_processes} x {role.role}: {terms}")
    return "; ".join(parts)


def _helps(roles: Sequence[RoleMemory], room: float) -> str:
    """The settings under which a process needs at most `room` bytes, each alone; or that even all are too little."""
    options = [option for role in roles for option in role.options]
    fitting = [option for option in options if option[1] <= room]
    if fitting:
        return "set " + ", or ".join(
            f"{line} ({num_bytes / GIB:.1f} GiB)" for line, num_bytes in fitting[:MOST_OPTIONS]
        )
    if not options:
        return ""
    line, num_bytes = min(options, key=lambda option: option[1])
    return f"even {line} needs {num_bytes / GIB:.1f} GiB: use a smaller model, or more memory"


def require(stage: StagePlan, cluster: Cluster) -> None:
    """Refuse a stage that does not fit the cluster, grown as far as it may.

    Raises:
        ResourceError: names stage, resource, need, what there is and may be, and the setting to lower.
    """
    lack = lacking(stage, cluster)
    if lack is not None:
        remark = f"; {cluster.remark}" if cluster.remark else ""
        raise ResourceError(f"stage {stage.name} ({stage.actors or 'driver'}) needs {lack}{remark}")
