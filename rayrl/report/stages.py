"""The stages of each pipeline, in order, and which of them a config leaves out."""

from collections.abc import Mapping
from typing import Any

STAGES = {
    "proxy_dpo": (
        "sft",
        "generate",
        "select",
        "query",
        "fit_evaluator",
        "synthesize",
        "pseudo_label",
        "dpo",
        "evaluate",
    ),
    "rlp": (
        "pool",
        "sft",
        "generate",
        "select",
        "query",
        "fit_evaluator",
        "preferences",
        "fit_reward_model",
        "ppo",
        "samples",
        "synthesize",
        "importance",
        "refit_reward_model",
        "ppo_refreshed",
        "track_rewards",
        "audit_pairs",
        "evaluate",
    ),
}
BEFORE, AFTER = ("pool", "sft"), ("track_rewards", "audit_pairs", "evaluate")
"""Stages that a run has once, whatever its rounds."""
_REWARDED_OTHERWISE = {
    "evaluator": {"pool", "sft", "generate", "select", "query", "fit_evaluator", "ppo", "evaluate"},
    "function": {"pool", "sft", "ppo", "evaluate"},
}
"""By `ppo.reward`, all that there is."""
_LEFT_OUT = {
    "spg": {"importance"},
    "reward_pairs": {"importance"},
    "self_judged": {"importance"},
    "uml": {"synthesize", "importance"},
    "ocrm": {"samples", "synthesize"},
    "none": {"samples", "synthesize", "importance", "refit_reward_model"},
}
"""By `refresh.method`."""


def pipeline_of(config: Mapping[str, Any]) -> str:
    """The pipeline a resolved config is for; configs of before there were two have the first one's tables."""
    return config.get("pipeline", "proxy_dpo")


def left_out(config: Mapping[str, Any]) -> set[str]:
    """Stages that a run with this config does not have, or (`select` of rlp) only if it turns out to need them."""
    if pipeline_of(config) != "rlp":
        return set() if config.get("pseudo_label", {}).get("synthetic") else {"synthesize"}
    if there := _REWARDED_OTHERWISE.get(reward_of(config)):
        return set(STAGES["rlp"]) - there | _without_sft(config)
    names = {"select", "query", "fit_evaluator"} | _LEFT_OUT.get(config.get("refresh", {}).get("method", "spg"), set())
    if has_ready_pairs(config):
        names.add("generate")
    if not config.get("evaluate", {}).get("diagnosis_budget"):
        names |= {"track_rewards", "audit_pairs"}
    elif "synthesize" in names:
        names.add("audit_pairs")
    return names | _without_sft(config)


def _without_sft(config: Mapping[str, Any]) -> set[str]:
    return {"sft"} if config.get("sft", {}).get("enabled") is False else set()


def nested(config: Mapping[str, Any]) -> set[str]:
    """Stages done within `preferences`, whose seconds contain theirs."""
    return {"select"} if pipeline_of(config) == "rlp" and reward_of(config) == "reward_model" else set()


def reward_of(config: Mapping[str, Any]) -> str:
    """What rewards PPO: "reward_model", "evaluator" or "function"."""
    return (config.get("ppo") or {}).get("reward", "reward_model")


def has_ready_pairs(config: Mapping[str, Any]) -> bool:
    """Whether the preferences are those of a file: then nothing is paid for them."""
    return reward_of(config) == "reward_model" and (config.get("preferences") or {}).get("source") == "data"
