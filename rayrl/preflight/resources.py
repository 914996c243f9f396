"""Resource needs of trainings and fleets, and their comparison with the cluster.

CPUs: a training worker reserves one, an engine the number in its config (0 by default), an oracle none. One CPU must
stay free for Ray Data, which otherwise waits for ever without a word. GPUs: a training worker takes a whole one, an
engine the number in its config, all of it on one node. Memory: on CPUs, the weights of every engine and worker, which
is less than they take. A fleet that may grow is planned at its largest: it must not take what a training needs. The
cluster counts as large as its autoscaler may make it.

This module knows no stage: which trainings and fleets are up at the same time is decided in
`rayrl.preflight.stage_plans`.
"""

import math
from collections.abc import Sequence

from rayrl.config import EngineConfig, RunConfig
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.plan import Needs, StagePlan, Whole
from rayrl.runs.stage_table import FleetUse, Training

FREE_CPUS = 1
"""Left to Ray Data."""


def training_needs(training: Training, *, on_gpu: bool) -> Needs:
    """Needs of the workers of one training."""
    settings = training.settings
    num_workers = settings.num_workers
    # Without a GPU the weights are in the nodes' memory: once in all under ZeRO-3, else once per worker.
    num_cpu_copies = num_workers if settings.zero_stage < 3 else 1
    lora = ", LoRA" if settings.lora is not None else ""
    return Needs(
        actors=f"{num_workers} worker(s), ZeRO-{settings.zero_stage}{lora}",
        num_gpus=num_workers if on_gpu else 0,
        num_cpus=num_workers,
        num_copies=0 if on_gpu else num_cpu_copies,
        setting=f"{training.section}.num_workers",
    )


def fleet_needs(fleet: FleetUse, config: RunConfig, *, on_gpu: bool) -> Needs:
    """Needs of all replicas of one fleet.

    Raises:
        ConfigError: a replica's share of GPUs is neither at most 1 nor whole.
    """
    if fleet.role == "entailment":
        return _entailment_needs(config, on_gpu=on_gpu)
    engine = config.generators if fleet.role == "generators" else config.embedders
    # Embedders may serve a smaller model than the policy, so that nothing is known of their weights.
    num_cpu_copies = engine.most if fleet.role == "generators" else 0
    kind = "generator" if fleet.role == "generators" else "embedder"
    limit = "num_replicas" if engine.max_replicas is None else "max_replicas"
    return Needs(
        actors=f"{engine.most} {kind}(s)",
        num_gpus=num_fleet_gpus(engine, fleet.role) if on_gpu else 0,
        num_cpus=0 if on_gpu else math.ceil(engine.most * engine.cpus_per_replica),
        num_copies=0 if on_gpu else num_cpu_copies,
        whole=_whole(engine, fleet.role, on_gpu=on_gpu),
        setting=f"{fleet.role}.{limit}",
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
        num_copies=sum(part.num_copies for part in parts),
        whole=tuple(whole),
        setting=setting,
    )


def _join_actors(parts: Sequence[Needs]) -> str:
    return " and ".join(part.actors for part in parts)


def lacking(needs: Needs, cluster: Cluster, copy_bytes: int) -> str | None:
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
    # Object store, key-value caches and optimizers come on top: this refuses only what is certain to fail.
    num_bytes = needs.num_copies * copy_bytes
    memory = cluster.memory()
    if num_bytes > memory:
        return (
            f"memory: over {num_bytes / 2**30:,.1f} GiB (the weights {needs.num_copies} times), "
            f"and the cluster has, or may get, {memory / 2**30:,.1f} GiB; {remedy}"
        )
    return None


def require(stage: StagePlan, cluster: Cluster, copy_bytes: int = 0) -> None:
    """Refuse a stage that does not fit the cluster, grown as far as it may.

    Raises:
        ResourceError: names stage, resource, need, what there is and may be, and the setting to lower.
    """
    lack = lacking(stage, cluster, copy_bytes)
    if lack is not None:
        remark = f"; {cluster.remark}" if cluster.remark else ""
        raise ResourceError(f"stage {stage.name} ({stage.actors or 'driver'}) needs {lack}{remark}")
