"""Controls of both papers that a config turns on, in words. A run without one is the method itself."""

from collections.abc import Iterator

from rayrl.config import RunConfig

LABELS = {
    "direct": "direct labels: DPO on the paid judgements alone",
    "expert": "all labels by the oracle: the ceiling",
    "shuffled": "shuffled labels: the floor",
}
REFRESHES = {
    "reward_pairs": "the best of a prompt's samples by the old reward model, paired with the worst",
    "self_judged": "the best of a prompt's samples by the policy itself (RLAIF), paired with the worst",
    "ocrm": "importance-weighted preferences, no synthetic pairs",
    "none": "a second PPO on the old reward model",
}


def controls(config: RunConfig) -> list[str]:
    """List the controls of a run."""
    return [*_of_reward(config), *_of_labels(config)]


def _of_reward(config: RunConfig) -> Iterator[str]:
    if config.pipeline != "rlp":
        return
    if not config.learns_from_comparisons:
        is_function = config.ppo.reward == "function"
        reward = f"the function {config.ppo.function}" if is_function else "an evaluator of actively selected labels"
        yield f"PPO on {reward}, no reward model"
        return
    refresh, model = config.refresh, config.reward_model
    if refresh.method in REFRESHES:
        yield REFRESHES[refresh.method]
    if refresh.method == "spg" and refresh.spg.gamma == 0:
        yield "Select-All: gamma 0 accepts every prompt with two clusters"
    if refresh.method == "uml" and refresh.uml.objective != "uml":
        yield f"multi-view objective {refresh.uml.objective}"
    if model.bottleneck is not None:
        yield "reward model with an information bottleneck (InfoRM)"
    if model.num_members > 1:
        yield f"ensemble of {model.num_members} reward models, {model.objective.replace('_', ' ')}"


def _of_labels(config: RunConfig) -> Iterator[str]:
    # These are the first paper's controls, of runs that learn from judgements.
    if not config.learns_from_judgements:
        return
    if config.labels in LABELS:
        yield LABELS[config.labels]
    if not config.embeds_pool and config.labels != "expert":
        yield f"{config.select.strategy.replace('_', ' ')} selection"
    if config.generate.source == "seed":
        yield "off-policy queries: responses of the seed data"
