"""What each stage reserves, against what the cluster has; and whether scoring and DPO run at once or in turn.

CPUs: a training worker reserves one, an engine what its config says (none unless it does), an oracle none, and one must
stay free for Ray Data, which otherwise waits for ever without a word. GPUs: a training worker takes a whole one, an
engine what its config says, all of it on one node. Memory: on CPUs, the weights of every engine and worker, which is
less than they take. A fleet that may grow is planned at its largest: it must not take what a training needs. The
cluster counts as what its autoscaler may make of it.
"""

import math
from dataclasses import replace

from rayrl.config import EngineConfig, RunConfig, TrainingConfig
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.plan import StagePlan, Whole

_FREE_CPUS = 1


def plan_stages(config: RunConfig, cluster: Cluster, copy_bytes: int = 0) -> tuple[tuple[StagePlan, ...], str, str]:
    """The stages with what they reserve, the mode, and where the reference log-probabilities come from.

    Args:
        config: the run.
        cluster: what there is, and may be.
        copy_bytes: memory of the policy's weights in an engine or worker; 0 is unknown, or not in the nodes' memory.

    Raises:
        ResourceError: a stage fits in no mode; names stage, resource, need and what there is.
        ConfigError: settings that exclude each other.
    """
    has_gpu = cluster.most("GPU") > 0
    reference = _reference(config, has_gpu)
    stages = {stage.name: stage for stage in _stages(config, has_gpu)}
    for stage in stages.values():
        require(stage, cluster, copy_bytes)
    if "pseudo_label" not in stages:
        return tuple(stages.values()), "alternate", reference
    overlapping = _overlapping(config, has_gpu, stages)
    mode = config.pseudo_label.mode
    if mode == "overlap":
        if reference == "pass":
            raise ConfigError(
                'pseudo_label.mode must be "auto" or "alternate" when the reference log-probabilities '
                'come from a pass before the first step (dpo.reference = "pass", or "auto" below float32), '
                'got "overlap"'
            )
        for stage in overlapping.values():
            require(stage, cluster, copy_bytes)
    elif mode == "auto":
        fits = all(_lacking(stage, cluster, copy_bytes) is None for stage in overlapping.values())
        mode = "overlap" if reference == "generation" and fits else "alternate"
    if mode == "overlap":
        stages |= overlapping
    return tuple(stages.values()), mode, reference


def _reference(config: RunConfig, has_gpu: bool) -> str:
    if config.dpo.reference != "auto":
        return config.dpo.reference
    is_exact = config.policy.dtype == "float32" or (config.policy.dtype == "auto" and not has_gpu)
    return "generation" if is_exact else "pass"


def _stages(config: RunConfig, has_gpu: bool) -> list[StagePlan]:
    """Each stage alone, in order."""
    evaluator, select = config.evaluator, config.select
    learns = config.labels in ("proxy", "shuffled")
    scorers = "generators" if evaluator.type == "generative" else "embedders"
    embeds = select.strategy == "k_center"
    what_select = f"{select.strategy} over {select.text}, {select.num_shards} shard(s)" if embeds else "random"
    stages = []
    if config.sft.enabled:
        stages.append(fit_plan("sft", "M0 -> M1 on the seed data", "sft", config.sft, has_gpu))
    stages.append(serve_plan("generate", f"{config.generate.k} responses per prompt", "generators", config, has_gpu))
    if config.labels == "expert":
        stages.append(StagePlan(name="query", what="the expert labels everything"))
    else:
        stages += [
            serve_plan("select", what_select, "embedders", config, has_gpu)
            if embeds
            else StagePlan(name="select", what=what_select),
            StagePlan(name="query", what=f"ask the {config.oracle.type} expert"),
        ]
    if learns:
        what = f"{evaluator.type} evaluator on the paid judgements"
        stages += [
            fit_plan("fit_evaluator", what, "evaluator", evaluator, has_gpu),
            *([clustering_plan(config, has_gpu, "the responses of a prompt")] if config.pseudo_label.synthetic else []),
            serve_plan(
                "pseudo_label",
                f"score the rest, pair {config.pseudo_label.pairing}",
                scorers,
                config,
                has_gpu,
            ),
        ]
    return [
        *stages,
        fit_plan("dpo", f"M1 -> M2, {config.dpo.loss}, beta {config.dpo.beta:g}", "dpo", config.dpo, has_gpu),
        serve_plan("evaluate", "M2 against M1 on held-out prompts", "generators", config, has_gpu),
        StagePlan(name="report", what="HTML and JSON"),
    ]


def fit_plan(name: str, what: str, section: str, training: TrainingConfig, has_gpu: bool) -> StagePlan:
    """A training, alone."""
    return StagePlan(
        name=name,
        what=what,
        actors=f"{training.num_workers} worker(s), ZeRO-{training.zero_stage}" + ", LoRA" * (training.lora is not None),
        num_gpus=training.num_workers if has_gpu else 0,
        num_cpus=training.num_workers,
        num_copies=0 if has_gpu else training.num_workers if training.zero_stage < 3 else 1,
        setting=f"{section}.num_workers",
    )


def serve_plan(name: str, what: str, section: str, config: RunConfig, has_gpu: bool) -> StagePlan:
    """A fleet, alone."""
    engine = config.generators if section == "generators" else config.embedders
    return StagePlan(
        name=name,
        what=what,
        actors=f"{engine.most} engine(s)",
        num_gpus=engine_gpus(engine, section) if has_gpu else 0,
        num_cpus=0 if has_gpu else math.ceil(engine.most * engine.cpus_per_replica),
        num_copies=engine.most if section == "generators" and not has_gpu else 0,  # embedders may serve a smaller model
        whole=_whole(engine, section, has_gpu),
        setting=f"{section}.{'num' if engine.max_replicas is None else 'max'}_replicas",
    )


def clustering_plan(config: RunConfig, has_gpu: bool, samples: str, *, is_up: bool = False) -> StagePlan:
    """What says which responses mean the same. Entailment makes room for the embeddings that are tried where it fails.

    Args:
        config: the run.
        has_gpu: whether engines take GPUs.
        samples: what is clustered, for humans.
        is_up: the embedding replicas of the clustering are there already, and counted with what is beside.
    """
    spg = config.refresh.spg
    what = f"cluster {samples} by meaning ({spg.clustering}), pair (gamma {spg.gamma:g})"
    embedders = serve_plan("synthesize", what, "embedders", config, has_gpu)
    if is_up:
        embedders = replace(embedders, num_gpus=0, num_cpus=0, num_copies=0)
    if spg.clustering == "embedding":
        return embedders
    hardware = EngineConfig(num_replicas=spg.num_replicas, gpus_per_replica=config.embedders.gpus_per_replica)
    num_gpus = engine_gpus(hardware, "embedders") if has_gpu else 0
    actors = f"{spg.num_replicas} entailment model(s)"
    entailment = replace(embedders, actors=actors, num_gpus=num_gpus, num_cpus=0, num_copies=0, whole=())
    entailment = replace(entailment, setting="refresh.spg.num_replicas")
    return max(entailment, embedders, key=lambda plan: (plan.num_gpus, plan.num_cpus))


def _overlapping(config: RunConfig, has_gpu: bool, stages: dict[str, StagePlan]) -> dict[str, StagePlan]:
    """The stages of mode `overlap` beside the fleets that are up then: those stay, into later rounds too.

    Every model that embeds has a fleet of its own; the entailment model's is stopped when it has done its work.
    """
    generators, embedders = (serve_plan("fleets", "", name, config, has_gpu) for name in ("generators", "embedders"))
    select, clusterer = config.select, config.refresh.spg.embedder or "policy"
    selecting = {select.embedder} if select.strategy == "k_center" else set[str]()
    scoring = selecting | ({"policy"} if config.evaluator.type == "scalar" else set())
    every = scoring | ({clusterer} if config.pseudo_label.synthetic else set())
    up = {"fit_evaluator": selecting, "synthesize": scoring, "dpo": every}
    if config.rounds > 1:
        up = dict.fromkeys(up, every)
    alone = dict(stages)
    if config.pseudo_label.synthetic:
        is_up = clusterer in up["synthesize"]
        alone["synthesize"] = clustering_plan(config, has_gpu, "the responses of a prompt", is_up=is_up)
    return {
        name: _overlapped(alone[name], generators, *[embedders] * len(models))
        for name, models in up.items()
        if name in alone
    }


def engine_gpus(engine: EngineConfig, section: str) -> int:
    """Whole GPUs a fleet occupies: a replica never straddles two of them."""
    each = engine.num_gpus
    if each > 1 and each != int(each):
        raise ConfigError(
            f"{section}.gpus_per_replica x tensor_parallel_size x pipeline_parallel_size must be at most 1 or whole, "
            f"got {each:g}"
        )
    if each >= 1:
        return engine.most * int(each)
    return math.ceil(engine.most / math.floor(1 / each + 1e-9)) if each > 0 else 0


def _whole(engine: EngineConfig, section: str, has_gpu: bool) -> tuple[Whole, ...]:
    """What a replica must find on one node. Ray keeps more than one GPU together by a placement group."""
    if has_gpu:
        sizes = f"{section}.tensor_parallel_size or {section}.pipeline_parallel_size"
        return (Whole(resource="GPU", amount=engine.num_gpus, setting=sizes),) if engine.num_gpus > 1 else ()
    return (Whole(resource="CPU", amount=engine.cpus_per_replica, setting=f"{section}.cpus_per_replica"),)


def beside(training: StagePlan, *fleets: StagePlan) -> StagePlan:
    """A training, or another fleet, and the fleets that are up then."""
    return StagePlan(
        name=training.name,
        what=training.what,
        actors=f"{training.actors}, beside {' and '.join(fleet.actors for fleet in fleets)}",
        num_gpus=training.num_gpus + sum(fleet.num_gpus for fleet in fleets),
        num_cpus=training.num_cpus + sum(fleet.num_cpus for fleet in fleets),
        num_copies=training.num_copies + sum(fleet.num_copies for fleet in fleets),
        whole=training.whole + tuple(part for fleet in fleets for part in fleet.whole),
        setting=" or ".join(dict.fromkeys([training.setting, *(fleet.setting for fleet in fleets)])),
    )


def _overlapped(stage: StagePlan, *fleets: StagePlan) -> StagePlan:
    both = beside(stage, *fleets)
    return replace(both, setting=f'{both.setting}, or set pseudo_label.mode = "alternate"')


def _lacking(stage: StagePlan, cluster: Cluster, copy_bytes: int) -> str | None:
    """What a stage needs and the cluster neither has nor may get: resource, needed, present and remedy."""
    lower = f"lower {stage.setting}" if stage.setting else "use a larger machine"
    for resource, needed, said in (
        ("GPU", stage.num_gpus, f"{stage.num_gpus:g}"),
        ("CPU", stage.num_cpus + _FREE_CPUS, f"{stage.num_cpus} and {_FREE_CPUS} free for Ray Data"),
    ):
        if needed > cluster.most(resource):
            return f"{resource}: {said}, and the cluster has {cluster.said(resource)}; {lower}"
    for part in stage.whole:
        if part.amount > (largest := cluster.largest(part.resource)):
            return (
                f"{part.resource}: {part.amount:g} on one node, and the largest that there is, or may be, has "
                f"{largest:g}; lower {part.setting}, use larger nodes"
            )
    if stage.num_copies * copy_bytes > (memory := cluster.memory()):
        return (
            f"memory: over {stage.num_copies * copy_bytes / 2**30:,.1f} GiB (the weights {stage.num_copies} times), "
            f"and the cluster has, or may get, {memory / 2**30:,.1f} GiB; {lower}"
        )
    return None


def require(stage: StagePlan, cluster: Cluster, copy_bytes: int = 0) -> None:
    """Refuse a stage that does not fit the cluster, grown as far as it may.

    Raises:
        ResourceError: names stage, resource, need, what there is and may be, and the setting to lower.
    """
    lack = _lacking(stage, cluster, copy_bytes)
    if lack is not None:
        remark = f"; {cluster.remark}" if cluster.remark else ""
        raise ResourceError(
            f"stage {stage.name} ({stage.actors or 'driver'}) needs {lack}, or use a larger cluster{remark}"
        )
