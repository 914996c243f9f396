"""The settings a report shows: those that say what the run was."""

from collections.abc import Mapping
from typing import Any

from rayrl.report.stages import pipeline_of, reward_of

_SHARED = {
    "rounds": "rounds",
    "policy": "policy.path",
    "prompts": "pool.path",
    "responses per prompt": "generate.k",
    "selection": "select.strategy",
}
_EXPERT = {
    "expert": "oracle.type",
    "expert model": "oracle.model",
    "expert function": "oracle.function",
}
SHOWN = {
    "proxy_dpo": {
        **_SHARED,
        "unit": "select.unit",
        "embedded text": "select.text",
        **_EXPERT,
        "evaluator": "evaluator.type",
        "scoring": "evaluator.scoring",
        "pairing": "pseudo_label.pairing",
        "synthetic pairs": "pseudo_label.synthetic",
        "DPO loss": "dpo.loss",
        "DPO beta": "dpo.beta",
        "DPO learning rate": "dpo.learning_rate",
        "DPO epochs": "dpo.epochs",
    },
    "rlp": {
        **_SHARED,
        "PPO reward": "ppo.reward",
        "reward function": "ppo.function",
        "evaluator": "evaluator.type",
        "scoring": "evaluator.scoring",
        "preferences": "preferences.source",
        "preference file": "preferences.data.path",
        "order of comparisons": "preferences.order",
        **_EXPERT,
        "comparing function": "oracle.compare_function",
        "reward models": "reward_model.num_members",
        "ready-made reward model": "reward_model.path",
        "ensemble objective": "reward_model.objective",
        "reward model learning rate": "reward_model.learning_rate",
        "PPO learning rate": "ppo.learning_rate",
        "PPO KL coefficient": "ppo.kl_coef",
        "PPO target KL": "ppo.target_kl",
        "PPO clip range": "ppo.clip_range",
        "PPO rollout size": "ppo.rollout_size",
        "PPO overlap": "ppo.overlap",
        "refresh": "refresh.method",
        "samples per prompt": "refresh.n",
        "clustering": "refresh.spg.clustering",
        "gamma": "refresh.spg.gamma",
        "views' objective": "refresh.uml.objective",
    },
}
_OF_METHOD = {"refresh.spg.": "spg", "refresh.uml.": "uml"}
_OF_REWARD = {
    "evaluator.": {"evaluator"},
    "preferences.": {"reward_model"},
    "reward_model.": {"reward_model"},
    "refresh.": {"reward_model"},
    "generate.k": {"reward_model", "evaluator"},
    "select.": {"reward_model", "evaluator"},
}
"""Of rlp: the rewards for which a table matters."""


def shown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Titles and values of the settings that are there and matter to the run's method."""
    method = config.get("refresh", {}).get("method")
    pipeline, reward = pipeline_of(config), reward_of(config)
    shown = {}
    for title, dotted in SHOWN[pipeline].items():
        if pipeline == "rlp" and any(dotted.startswith(p) and reward not in of for p, of in _OF_REWARD.items()):
            continue
        needs = next((name for prefix, name in _OF_METHOD.items() if dotted.startswith(prefix)), method)
        value: Any = config
        for name in dotted.split("."):
            value = (value or {}).get(name)
        if value is not None and needs == method:
            shown[title] = value
    return shown
