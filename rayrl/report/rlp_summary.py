"""What a run of the second pipeline says beyond its manifests: gains between policies, reward models, compute."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.algorithms.statistics import paired_difference
from rayrl.report.rounds import latest, num_rounds, round_name, titled, untitled
from rayrl.report.stages import nested, reward_of

BEST_OF_N = "best_of_n"
REWARD_MODELS = {"r": "fit_reward_model", "refreshed": "refit_reward_model"}
PLAIN_RLHF = ("pool", "sft", "generate", "select", "query", "fit_evaluator", "preferences", "fit_reward_model", "ppo")
NOT_TRAINING = ("track_rewards", "audit_pairs", "evaluate")
"""Stages that only look."""
CONTROLS = {
    "reward_pairs": "the best of a prompt's samples by the old reward model, paired with the worst",
    "self_judged": "the best of a prompt's samples by the policy itself (RLAIF), paired with the worst",
    "ocrm": "importance-weighted preferences, no synthetic pairs",
    "none": "a second PPO on the old reward model",
}


def rlp_facts(
    config: Mapping[str, Any],
    metrics: Mapping[str, dict[str, Any]],
    stages: Sequence[dict[str, Any]],
    evaluated: pa.Table | None,
) -> dict[str, Any]:
    """The facts of one run as plain values; what it has not reached is None.

    Args:
        config: the run's, resolved.
        metrics: of every stage's manifest, the last round's.
        stages: the stages with state and seconds.
        evaluated: the table of `evaluate`, if there is one.
    """
    rounds, found = num_rounds(config), metrics["evaluate"]
    trained = trained_titles(config)
    last = {name: latest(found.get("policies", {}), name, rounds) for name in trained}
    last |= {name: latest(found.get("reward_accuracy", {}), name, rounds) for name in reward_titles(config)}
    titles = policy_titles(metrics, config, evaluated)
    aligned = "rlp" if last.get("rlp") in titles else "ppo"
    return {
        "reward": reward_of(config),
        "aligned": aligned,
        "gain": policy_row(metrics, last[aligned]).get("difference"),
        "gain_of_ppo": policy_row(metrics, "ppo").get("difference"),
        "gain_over_ppo": _gain_over(evaluated, last["rlp"], "ppo") if "rlp" in last else None,
        "latest": last,
        "titles": titles,
        "trained": trained,
        "ppos": ppo_titles(config),
        "rewards": reward_titles(config),
        "asked": "preference queries" if reward_of(config) == "reward_model" else "label queries",
        "reward_models": {name: _reward_model(metrics[stage]) for name, stage in REWARD_MODELS.items()},
        "compute": _compute(config, stages, titled("ppo_refreshed", rounds)),
    }


def policy_row(metrics: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What `evaluate` measured of a policy; empty if it did not."""
    return metrics["evaluate"].get("policies", {}).get(name, {})


def trained_titles(config: Mapping[str, Any]) -> dict[str, str]:
    """What the policies of one round are called, by name."""
    if reward_of(config) != "reward_model":
        return {"ppo": "PPO"}
    return {"ppo": "plain PPO", "rlp": "second PPO" if _method(config) == "none" else "RLP"}


def policy_titles(
    metrics: Mapping[str, dict[str, Any]], config: Mapping[str, Any], evaluated: pa.Table | None = None
) -> dict[str, str]:
    """What the policies of a run are called: those it evaluated, or before that those of one round."""
    trained = trained_titles(config)
    titles = {"m1": "M1"} | trained
    for number in range(2, num_rounds(config) + 1):
        later = trained | {"ppo": "PPO"}
        titles |= {round_name(name, number): titled(title, number) for name, title in later.items()}
    titles |= {BEST_OF_N: f"M1, best of {config.get('evaluate', {}).get('best_of_n', 0)}"}
    found = metrics["evaluate"].get("policies", ["m1", *trained])
    columns = [f"{name}_score" for name in found] if evaluated is None else evaluated.column_names
    return {name: title for name, title in titles.items() if name in found and f"{name}_score" in columns}


def ppo_titles(config: Mapping[str, Any]) -> dict[str, str]:
    """What the PPOs of a run are called, by stage."""
    if reward_of(config) != "reward_model":
        return {"ppo": "PPO"}
    old = _method(config) == "none"
    return {
        "ppo": "plain PPO",
        "ppo_refreshed": "second PPO on the old reward model" if old else "PPO on the refreshed reward",
    }


def reward_titles(config: Mapping[str, Any]) -> dict[str, str]:
    """What the rewards of a run are called, by the name under which they were measured."""
    match reward_of(config):
        case "reward_model":
            return {"r": "r"} if _method(config) == "none" else {"r": "r", "refreshed": "refreshed"}
        case other:
            return {"reward": f"the {other}"}


def rlp_controls(config: Mapping[str, Any]) -> list[str]:
    """Which controls the config turns on; empty is the method itself."""
    match reward_of(config):
        case "evaluator":
            return ["PPO on an evaluator of actively selected labels, no reward model"]
        case "function":
            return [f"PPO on the function {config['ppo'].get('function')}, no reward model"]
    refresh, method = config.get("refresh", {}), _method(config)
    found = [CONTROLS[method]] if method in CONTROLS else []
    if method == "spg" and refresh.get("spg", {}).get("gamma") == 0:
        found.append("Select-All: gamma 0 accepts every prompt with two clusters")
    if method == "uml" and (objective := refresh.get("uml", {}).get("objective", "uml")) != "uml":
        found.append(f"multi-view objective {objective}")
    model = config.get("reward_model", {})
    if (num := model.get("num_members", 1)) > 1:
        found.append(f"ensemble of {num} reward models, {model.get('objective', 'mean').replace('_', ' ')}")
    return found


def _method(config: Mapping[str, Any]) -> str:
    return config.get("refresh", {}).get("method", "spg")


def _gain_over(evaluated: pa.Table | None, ours: str, base: str) -> dict[str, Any] | None:
    """Paired difference in expert score of two policies, over the prompts where both were scored."""
    names = [f"{name}_score" for name in (ours, base)]
    if evaluated is None or not set(names) <= set(evaluated.column_names):
        return None
    mine, theirs = (np.array(evaluated[name].to_pylist(), np.float64) for name in names)
    both = ~(np.isnan(mine) | np.isnan(theirs))
    return asdict(paired_difference(mine[both], theirs[both])) if both.sum() > 1 else None


def _reward_model(metrics: dict[str, Any]) -> dict[str, Any]:
    """A reward model on the held-out pairs. The calibration error of an ensemble, whose rewards are standardised, would
    say nothing: it is the mean of its members'.
    """
    if not metrics:
        return {}
    members, validation = metrics.get("members", []), metrics.get("validation", {})
    errors = [m["calibration_error"] for m in members if m.get("calibration_error") is not None]
    found = {"num_members": len(members), "num_pairs": metrics.get("num_pairs")} | validation
    return found | {"calibration_error": float(np.mean(errors))} if len(members) > 1 and errors else found


def _compute(config: Mapping[str, Any], stages: Sequence[dict[str, Any]], end: str) -> dict[str, float | None]:
    """Seconds of plain RLHF (to the end of the first PPO), of RLP, and of judging all; None until they are over.

    RLP, with all its rounds, is over when the stage `end` is.
    """
    inner = nested(config)
    known = [s for s in stages if s["seconds"] is not None and untitled(s["stage"]) not in inner]
    seconds = {s["stage"]: s["seconds"] for s in known}
    plain = sum(seconds.get(name, 0.0) for name in PLAIN_RLHF) if "ppo" in seconds else None
    added = [name for name in seconds if name not in (*PLAIN_RLHF, *NOT_TRAINING)]
    extra = sum(seconds[name] for name in added) if end in seconds else None
    total = plain + extra if plain is not None and extra is not None else None
    return {
        "plain_rlhf_s": plain,
        "refresh_s": extra,
        "rlp_s": total,
        "ratio": total / plain if total and plain else None,
        "evaluate_s": sum(seconds.get(name, 0.0) for name in NOT_TRAINING) if "evaluate" in seconds else None,
    }
