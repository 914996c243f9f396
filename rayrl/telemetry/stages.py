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
NESTED = ("select",)
"""Of rlp: done within `preferences`, whose seconds contain theirs."""
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
    names = {"select"} | _LEFT_OUT.get(config.get("refresh", {}).get("method", "spg"), set())
    if has_ready_pairs(config):
        names.add("generate")
    if not config.get("evaluate", {}).get("diagnosis_budget"):
        names |= {"track_rewards", "audit_pairs"}
    elif "synthesize" in names:
        names.add("audit_pairs")
    if config.get("sft", {}).get("enabled") is False:
        names.add("sft")
    return names


def has_ready_pairs(config: Mapping[str, Any]) -> bool:
    """Whether the preferences are those of a file: then nothing is paid for them."""
    return (config.get("preferences") or {}).get("source") == "data"
