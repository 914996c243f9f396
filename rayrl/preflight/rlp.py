"""The stages of the second pipeline with what they reserve, and what it pays for."""

from collections.abc import Callable

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.plan import StagePlan
from rayrl.preflight.resources import beside, fit_plan, require, serve_plan

REFRESHES = {
    "spg": "cluster {n} samples a prompt by meaning, pair, refit (gamma {gamma:g})",
    "uml": "refit with a multi-view bottleneck on {n} samples a prompt",
    "reward_pairs": "control: pair {n} samples a prompt by the old rewards, refit",
    "self_judged": "control: pair {n} samples a prompt by the policy's own judgement, refit",
    "ocrm": "refit on importance-weighted preferences",
    "none": "control: keep the old reward model",
}


def plan_rlp_stages(config: RunConfig, cluster: dict[str, float]) -> tuple[StagePlan, ...]:
    """The stages, in order. PPO needs trainer and replicas at once: there is no other mode.

    Raises:
        ResourceError: a stage does not fit; names stage, resource, need and what there is.
    """
    has_gpu = cluster.get("GPU", 0) > 0
    generators = serve_plan("generators", "", "generators", config, has_gpu)
    embedders = serve_plan("embedders", "", "embedders", config, has_gpu)

    def ppo(name: str, what: str) -> StagePlan:
        trainer = fit_plan(name, what, "ppo", config.ppo, has_gpu)
        return beside(trainer, generators, embedders)

    stages = []
    if config.sft.enabled:
        stages.append(fit_plan("sft", "M0 -> M1 on the seed data", "sft", config.sft, has_gpu))
    stages += _rewarded(config, has_gpu, ppo) if config.ppo.reward == "reward_model" else _alone(config, has_gpu, ppo)
    stages += [
        serve_plan("evaluate", "every policy against M1 on held-out prompts", "generators", config, has_gpu),
        StagePlan(name="report", what="HTML and JSON"),
    ]
    for stage in stages:
        require(stage, cluster)
    return tuple(stages)


def _rewarded(config: RunConfig, has_gpu: bool, ppo: Callable[[str, str], StagePlan]) -> list[StagePlan]:
    """The paper's stages."""
    assert config.preferences is not None, "the config is refused without preferences"
    source = "pairs of a file" if config.preferences.source == "data" else f"ask the {config.oracle.type} expert"
    num = config.reward_model.num_members
    of_members = f", {num} members, {config.reward_model.objective}" if num > 1 else ""
    fit = fit_plan(
        "fit_reward_model", f"Bradley-Terry from M1{of_members}", "reward_model", config.reward_model, has_gpu
    )
    refresh = config.refresh
    what = REFRESHES[refresh.method].format(n=refresh.n, gamma=refresh.spg.gamma)
    return [
        StagePlan(name="preferences", what=source),
        fit,
        ppo("ppo", f"M1 -> pi, rollouts of {config.ppo.rollout_size}"),
        fit_plan("refresh", what, "reward_model", config.reward_model, has_gpu)
        if refresh.method != "none"
        else StagePlan(name="refresh", what=what),
        ppo("ppo_refreshed", "M1 -> pi^ on the refreshed rewards"),
    ]


def _alone(config: RunConfig, has_gpu: bool, ppo: Callable[[str, str], StagePlan]) -> list[StagePlan]:
    """PPO on a function, or on an evaluator of actively selected labels."""
    what = f"M1 -> pi, rollouts of {config.ppo.rollout_size}"
    if config.ppo.reward == "function":
        return [ppo("ppo", f"{what}, rewarded by {config.ppo.function}")]
    return [
        serve_plan("generate", f"{config.generate.k} responses per prompt", "generators", config, has_gpu),
        serve_plan("select", f"{config.select.strategy} over {config.select.text}", "embedders", config, has_gpu),
        StagePlan(name="query", what=f"ask the {config.oracle.type} expert"),
        fit_plan("fit_evaluator", f"{config.evaluator.type} evaluator", "evaluator", config.evaluator, has_gpu),
        ppo("ppo", f"{what}, rewarded by the evaluator"),
    ]


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
