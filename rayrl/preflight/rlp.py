"""The stages of the second pipeline with what they reserve, and what it pays for."""

from dataclasses import replace

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.plan import StagePlan
from rayrl.preflight.resources import beside, clustering_plan, fit_plan, require, serve_plan

REFRESHES = {
    "spg": "refit on D and the synthetic pairs",
    "uml": "refit with a multi-view bottleneck on {n} samples a prompt",
    "reward_pairs": "control: pair the best of {n} samples with the worst, by the old rewards, refit",
    "self_judged": "control: pair the best of {n} samples with the worst, by the policy's own judgement, refit",
    "ocrm": "refit on importance-weighted preferences",
    "none": "control: keep the old reward model",
}


def plan_rlp_stages(config: RunConfig, cluster: Cluster, copy_bytes: int = 0) -> tuple[StagePlan, ...]:
    """The stages, in order. No fleet makes room for a training: whatever is up then is beside it.

    Args:
        config: the run.
        cluster: what there is, and may be.
        copy_bytes: memory of the policy's weights in an engine or worker; 0 is unknown, or not in the nodes' memory.

    Raises:
        ResourceError: a stage does not fit; names stage, resource, need and what there is.
    """
    has_gpu = cluster.most("GPU") > 0
    stages = []
    if config.sft.enabled:
        stages.append(fit_plan("sft", "M0 -> M1 on the seed data", "sft", config.sft, has_gpu))
    stages += _rewarded(config, has_gpu) if config.ppo.reward == "reward_model" else _alone(config, has_gpu)
    stages += [
        serve_plan("evaluate", "every policy against M1 on held-out prompts", "generators", config, has_gpu),
        StagePlan(name="report", what="HTML and JSON"),
    ]
    for stage in stages:
        require(stage, cluster, copy_bytes)
    return tuple(stages)


def _rewarded(config: RunConfig, has_gpu: bool) -> list[StagePlan]:
    """The paper's stages."""
    assert config.preferences is not None, "the config is refused without preferences"
    generators, embedders = _fleets(config, has_gpu)
    refresh = config.refresh
    num = config.reward_model.num_members
    of_members = f", {num} members, {config.reward_model.objective}" if num > 1 else ""
    first = "fit_reward_model", f"Bradley-Terry from M1{of_members}"
    stages = [StagePlan(name="preferences", what="pairs of a file")]
    if config.asks_for_comparisons:
        stages = _selected(config, has_gpu, "preferences", f"the {config.oracle.type} expert compares M1's responses")
    if config.reward_model.path is not None:
        stages.append(StagePlan(name=first[0], what="a ready-made reward model"))
    else:
        fit = fit_plan(*first, "reward_model", config.reward_model, has_gpu)
        stages.append(_beside_labels(fit, config, has_gpu) if config.asks_for_comparisons else fit)
    stages.append(_ppo("ppo", f"M1 -> pi, rollouts of {config.ppo.rollout_size}", config, has_gpu))
    if refresh.method == "spg":
        samples = f"{refresh.n} samples a prompt"
        cluster = clustering_plan(config, has_gpu, samples, is_up=config.clusters_by_rewarders)
        stages.append(beside(cluster, generators, embedders))
    what = REFRESHES[refresh.method].format(n=refresh.n)
    if refresh.method == "none":
        stages.append(StagePlan(name="refresh", what=what))
    else:
        refit = fit_plan("refresh", what, "reward_model", config.reward_model, has_gpu)
        stages.append(beside(refit, generators, embedders))
    rewards = "the old rewards" if refresh.method == "none" else "the refreshed rewards"
    return [*stages, _ppo("ppo_refreshed", f"M1 -> pi^ on {rewards}", config, has_gpu)]


def _alone(config: RunConfig, has_gpu: bool) -> list[StagePlan]:
    """PPO on a function, or on an evaluator of actively selected labels."""
    what = f"M1 -> pi, rollouts of {config.ppo.rollout_size}"
    if config.ppo.reward == "function":
        return [_ppo("ppo", f"{what}, rewarded by {config.ppo.function}", config, has_gpu)]
    fit = fit_plan("fit_evaluator", f"{config.evaluator.type} evaluator", "evaluator", config.evaluator, has_gpu)
    return [
        *_selected(config, has_gpu, "query", f"ask the {config.oracle.type} expert"),
        _beside_labels(fit, config, has_gpu),
        _ppo("ppo", f"{what}, rewarded by the evaluator", config, has_gpu),
    ]


def _fleets(config: RunConfig, has_gpu: bool) -> tuple[StagePlan, StagePlan]:
    """Generators, and the embedders that serve reward models."""
    generators = serve_plan("generators", "", "generators", config, has_gpu)
    return generators, serve_plan("embedders", "", "embedders", config, has_gpu)


def _selected(config: RunConfig, has_gpu: bool, name: str, what: str) -> list[StagePlan]:
    """The responses, the few that are asked about, and the stage that asks.

    What embeds them is stopped then, unless it serves the reward; in a later round that is up already.
    """
    generators, embedders = _fleets(config, has_gpu)
    rewarders = config.rounds > 1 and config.rewards_by_embedders and not config.selects_by_rewarders
    sampled = f"{config.generate.k} responses per prompt"
    stages = [serve_plan("generate", sampled, "generators", config, has_gpu)]
    if config.select.strategy == "k_center":
        embed = replace(embedders, name="select", what=f"k_center over {config.select.text}")
        stages.append(beside(embed, generators, *[embedders] * rewarders))
    return [*stages, StagePlan(name=name, what=what)]


def _beside_labels(fit: StagePlan, config: RunConfig, has_gpu: bool) -> StagePlan:
    """A fit on fresh labels beside the generators and, where they are up already, the replicas that reward."""
    generators, embedders = _fleets(config, has_gpu)
    kept = config.select.strategy == "k_center" and config.selects_by_rewarders
    return beside(fit, generators, *[embedders] * (kept or (config.rounds > 1 and config.rewards_by_embedders)))


def _ppo(name: str, what: str, config: RunConfig, has_gpu: bool) -> StagePlan:
    """PPO beside the replicas that answer and, if a reward model or scalar evaluator rewards, those that serve it."""
    generators, embedders = _fleets(config, has_gpu)
    trainer = fit_plan(name, what, "ppo", config.ppo, has_gpu)
    return beside(trainer, generators, *[embedders] * config.rewards_by_embedders)


def check_transfer(config: RunConfig, cluster: Cluster) -> None:
    """Refuse NCCL where it cannot be.

    Raises:
        ConfigError: names the setting.
    """
    if config.ppo.weight_transfer != "nccl":
        return
    if cluster.most("GPU") == 0:
        raise ConfigError(
            'ppo.weight_transfer must be "auto" or "folder" on a cluster without GPUs, got "nccl"; leave it out'
        )
    if config.generators.gpus_per_replica < 1:
        raise ConfigError(
            'generators.gpus_per_replica must be at least 1 when ppo.weight_transfer is "nccl", which gives each of '
            f"its ranks a GPU of its own, got {config.generators.gpus_per_replica:g}; raise it, or set "
            'ppo.weight_transfer = "folder"'
        )


def check_room(config: RunConfig, model: ModelFacts) -> None:
    """Refuse settings under which PPO could not work at all.

    Raises:
        ConfigError: names the setting.
    """
    if model.max_model_len is not None and config.generate.max_tokens >= model.max_model_len:
        raise ConfigError(
            f"generate.max_tokens must leave room for a prompt in the context of {model.max_model_len} tokens, got "
            f"{config.generate.max_tokens}; lower it"
        )
    if config.pool.num_eval < 1:
        raise ConfigError(
            "pool.num_eval must be at least 1: PPO measures the reward on held-out prompts, got 0; hold some out"
        )
