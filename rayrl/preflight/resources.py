"""What each stage reserves, against what the cluster has; and whether scoring and DPO run at once or in turn.

CPUs: a training worker reserves one, engines and oracles none, and one must stay free for Ray Data, which
otherwise waits for ever without a word. GPUs: a training worker takes a whole one, an engine what its config
says.
"""

import math
import os
import re
from dataclasses import replace

from rayrl.config import EngineConfig, RunConfig, TrainingConfig
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight.plan import StagePlan

_FREE_CPUS = 1


def cluster_resources() -> dict[str, float]:
    """Resources of the Ray cluster that RAY_ADDRESS names, or of this machine if it names none.

    Raises:
        ResourceError: the cluster does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(_num_local_gpus())}
    import ray

    if ray.is_initialized():
        return dict(ray.cluster_resources().items())
    try:
        ray.init(address, log_to_driver=False)
    except ConnectionError as error:
        raise ResourceError(
            f"RAY_ADDRESS must name a running cluster, got {address}: {error}; start it, or unset RAY_ADDRESS"
        ) from None
    resources = ray.cluster_resources()
    ray.shutdown()
    return dict(resources.items())


def _num_local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])


def plan_stages(config: RunConfig, cluster: dict[str, float]) -> tuple[tuple[StagePlan, ...], str, str]:
    """The stages with what they reserve, the mode, and where the reference log-probabilities come from.

    Raises:
        ResourceError: a stage fits in no mode; names stage, resource, need and what there is.
        ConfigError: settings that exclude each other.
    """
    has_gpu = cluster.get("GPU", 0) > 0
    reference = _reference(config, has_gpu)
    stages = {stage.name: stage for stage in _stages(config, has_gpu)}
    for stage in stages.values():
        require(stage, cluster)
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
            require(stage, cluster)
    elif mode == "auto":
        fits = all(_missing(stage, cluster) is None for stage in overlapping.values())
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
        setting=f"{section}.num_workers",
    )


def serve_plan(name: str, what: str, section: str, config: RunConfig, has_gpu: bool) -> StagePlan:
    """A fleet, alone."""
    engine = config.generators if section == "generators" else config.embedders
    return StagePlan(
        name=name,
        what=what,
        actors=f"{engine.num_replicas} engine(s)",
        num_gpus=engine_gpus(engine, section) if has_gpu else 0,
        setting=f"{section}.num_replicas",
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
        embedders = replace(embedders, num_gpus=0)
    if spg.clustering == "embedding":
        return embedders
    hardware = config.embedders.model_copy(update={"num_replicas": spg.num_replicas, "tensor_parallel_size": 1})
    num_gpus = engine_gpus(hardware, "embedders") if has_gpu else 0
    actors = f"{spg.num_replicas} entailment model(s)"
    entailment = replace(embedders, actors=actors, num_gpus=num_gpus, setting="refresh.spg.num_replicas")
    return max(entailment, embedders, key=lambda plan: plan.num_gpus)


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
    each = engine.gpus_per_replica * engine.tensor_parallel_size
    if each > 1 and each != int(each):
        raise ConfigError(f"{section}.gpus_per_replica x tensor_parallel_size must be at most 1 or whole, got {each:g}")
    if each >= 1:
        return engine.num_replicas * int(each)
    return math.ceil(engine.num_replicas / math.floor(1 / each + 1e-9)) if each > 0 else 0


def beside(training: StagePlan, *fleets: StagePlan) -> StagePlan:
    """A training, or another fleet, and the fleets that are up then."""
    return StagePlan(
        name=training.name,
        what=training.what,
        actors=f"{training.actors}, beside {' and '.join(fleet.actors for fleet in fleets)}",
        num_gpus=training.num_gpus + sum(fleet.num_gpus for fleet in fleets),
        num_cpus=training.num_cpus,
        setting=" or ".join(dict.fromkeys([training.setting, *(fleet.setting for fleet in fleets)])),
    )


def _overlapped(stage: StagePlan, *fleets: StagePlan) -> StagePlan:
    both = beside(stage, *fleets)
    return replace(both, setting=f'{both.setting}, or set pseudo_label.mode = "alternate"')


def _missing(stage: StagePlan, cluster: dict[str, float]) -> str | None:
    """Which resource is too little for a stage."""
    if stage.num_gpus > cluster.get("GPU", 0):
        return "GPU"
    return "CPU" if stage.num_cpus + _FREE_CPUS > cluster.get("CPU", 0) else None


def require(stage: StagePlan, cluster: dict[str, float]) -> None:
    """Refuse a stage that does not fit the cluster.

    Raises:
        ResourceError: names stage, resource, need, what there is, and the setting to lower.
    """
    resource = _missing(stage, cluster)
    if resource is None:
        return
    needed = f"{stage.num_gpus:g}" if resource == "GPU" else f"{stage.num_cpus} and {_FREE_CPUS} free for Ray Data"
    remedy = f"lower {stage.setting}" if stage.setting else "use a larger machine"
    raise ResourceError(
        f"stage {stage.name} ({stage.actors or 'driver'}) needs {resource}: {needed}, and the cluster has "
        f"{cluster.get(resource, 0):g}; {remedy}, or use a larger cluster"
    )
