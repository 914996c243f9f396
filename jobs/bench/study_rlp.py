"""Reward learning on policy beside its controls, over several seeds: what did refreshing the reward model buy?

    python jobs/bench/study_rlp.py jobs/configs/rlp_stories.toml --seeds 0 1 2 [section.key=value ...]

Runs every variant with every seed into RUN_DIR/<variant>-<seed>. What they have in common (M1, the preferences, r, the
first PPO and its samples) is done once per seed, by the first variant. Prints one table of policies and one of reward
models. Rerun it to continue an interrupted study.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from plain_rlhf import plain_rlhf
from ray.actor import ActorHandle
from seeds import Results, finish, markdown, mean_of, pooled, stage_metrics, study

from rayrl.algorithms.statistics import paired_difference
from rayrl.config import load_config
from rayrl.fleets.services import Services
from rayrl.pipelines.rlp import rlp
from rayrl.pipelines.run_pipeline import Pipeline
from rayrl.report.tables import read_parquet
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run
from rayrl.stages.evaluation.evaluate_policies import evaluate_policies

BASE = "spg"
"""The variant that does what all have in common."""
PLAIN = {"m1": "M1", "best_of_n": "M1, best of n by r", "ppo": "plain PPO"}
"""Policies of its run that are rows of their own; the second only with `evaluate.best_of_n`."""
HELD_OUT, AGAINST_M1 = "held-out pairs", "PPO's answers against M1's"
OF_PPO, OF_REFRESHED = "pairs of PPO's answers", "pairs of the new policy's answers"


def first_ppo_only(run: Run, services: Services, oracle: ActorHandle) -> Manifest:
    """Plain RLHF and its evaluation: for what changes the first reward, without a refresh."""
    done = plain_rlhf(run, services, oracle)
    policies = {"m1": done.m1, "ppo": done.policy}
    return evaluate_policies(run, services, oracle, done.pool, policies, {"r": done.r})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    title: str
    overrides: tuple[str, ...]
    policy: str = "rlp"
    """Which of its run's policies the row is about."""
    pipeline: Pipeline = rlp
    shared: str | None = BASE
    """Whose stages it takes over."""


def refreshed(title: str, *overrides: str) -> Variant:
    """A way to refresh the reward model."""
    return Variant(title=title, overrides=overrides)


def ensemble(objective: str, shared: str = "ensemble-mean") -> Variant:
    """PPO on an ensemble, whose members do not depend on the objective."""
    return Variant(
        title=f"PPO on an ensemble of 3, {objective.replace('_', ' ')}",
        overrides=("reward_model.num_members=3", f"reward_model.objective={objective}"),
        policy="ppo",
        pipeline=first_ppo_only,
        shared=shared,
    )


VARIANTS: dict[str, Variant] = {
    BASE: Variant(title="RLP-SPG", overrides=("refresh.method=spg",), shared=None),
    "uml": refreshed("RLP-UML", "refresh.method=uml"),
    "uml-paper": refreshed(
        "RLP-UML, divergence weighted 1 as in the paper", "refresh.method=uml", "refresh.uml.skl_weight=1"
    ),
    "second-ppo": refreshed("second PPO, old reward model", "refresh.method=none"),
    "reward-pairs": refreshed("pairs ranked by the old reward model", "refresh.method=reward_pairs"),
    "select-all": refreshed("SPG without selection (gamma 0)", "refresh.method=spg", "refresh.spg.gamma=0"),
    "self-judged": refreshed("pairs judged by the policy itself", "refresh.method=self_judged"),
    "ocrm": refreshed("importance-weighted preferences (OCRM)", "refresh.method=ocrm"),
    "ensemble-mean": ensemble("mean", shared=BASE),
    "ensemble-worst-case": ensemble("worst_case"),
    "ensemble-uncertainty": ensemble("uncertainty_weighted"),
    "infomax": refreshed("UML's ablation InfoMax", "refresh.method=uml", "refresh.uml.objective=infomax"),
    "mvi": refreshed("UML's ablation mutual information only", "refresh.method=uml", "refresh.uml.objective=mvi"),
    "contrastive": refreshed("UML's ablation contrastive", "refresh.method=uml", "refresh.uml.objective=contrastive"),
}


def finished(options: argparse.Namespace, name: str, seed: int) -> str:
    """The folder of a variant's finished run; the run it shares stages with is finished first."""
    variant = VARIANTS[name]
    shared = finished(options, variant.shared, seed) if variant.shared else None
    config = load_config(options.config, [*options.overrides, *variant.overrides, f"seed={seed}"])
    folder = storage.join(config.run_dir, f"{name}-{seed}")
    update = {"name": f"{config.name}-{name}-{seed}", "run_dir": folder, "reuse": shared}
    return finish(config.model_copy(update=update), variant.pipeline)


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What one run says of its policy and its reward models, beside M1 and the plain PPO of the same seed."""
    policy = VARIANTS[name].policy
    base, folder = finished(options, BASE, seed), finished(options, name, seed)
    plain, tracked = rows_of(stage_metrics(base, "evaluate")), stage_metrics(folder, "track_rewards")
    evaluated = stage_metrics(folder, "evaluate")
    validated = {"r": "fit_reward_model", "refreshed": "refit_reward_model"}
    return rows_of(evaluated)[policy] | {
        "plain": {name: plain.get(name) for name in PLAIN},
        "over_ppo": paired(expert_scores(folder, policy), expert_scores(base, "ppo")),
        "agreement": {
            HELD_OUT: {r: stage_metrics(folder, s).get("validation", {}).get("accuracy") for r, s in validated.items()},
            AGAINST_M1: {r: evaluated["reward_accuracy"].get(r, {}).get("ppo") for r in validated},
            OF_PPO: at_the_end(tracked, "ppo"),
            OF_REFRESHED: at_the_end(tracked, "ppo_refreshed"),
        },
    }


def rows_of(evaluated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of every policy, with its win rate against the reference answers, if there are any."""
    beside = evaluated.get("references", {}).get("policies", {})
    return {
        name: row | {"against_references": beside.get(name, {}).get("win_rate")}
        for name, row in evaluated["policies"].items()
    }


def at_the_end(tracked: dict[str, Any], ppo: str) -> dict[str, Any]:
    """Each reward model's accuracy on pairs of the final policy's own answers; nothing without a diagnosis budget."""
    points = [point for point in tracked.get("points", []) if point["ppo"] == ppo]
    return {name: reward["accuracy"] for name, reward in points[-1]["rewards"].items()} if points else {}


def expert_scores(folder: str, policy: str) -> dict[str, float]:
    """The expert's score of a policy's answer, by prompt."""
    table = read_parquet(storage.join(folder, "stages", "evaluate", "table"))
    assert table is not None, f"{folder} has no table of answers"
    rows = zip(table["prompt_id"].to_pylist(), table[f"{policy}_score"].to_pylist(), strict=True)
    return {prompt: score for prompt, score in rows if score is not None}


def paired(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Mean difference over the prompts that both have."""
    both = sorted(ours.keys() & theirs.keys())
    return asdict(paired_difference(np.array([ours[p] for p in both]), np.array([theirs[p] for p in both])))


def plus_minus(estimates: Sequence[dict[str, Any] | None], pattern: str = ".3f") -> str:
    """Mean +- standard error over seeds (if there are several), over prompts; "-" where a run has no such number."""
    there = [estimate for estimate in estimates if estimate is not None]
    if not there:
        return "-"
    mean, between, within = pooled(there)
    errors = [f"{error:{pattern.removeprefix('+')}}" for error in (between, within) if not math.isnan(error)]
    return f"{mean:{pattern}} +- {', '.join(errors)}"


def policy_row(title: str, rows: list[dict[str, Any]], over_ppo: str = "-") -> list[str]:
    """The table's cells of a policy, from what `evaluate` measured of it with every seed."""
    scores, wins = [r["score"] for r in rows], [r["win_rate"] for r in rows]
    cells = [title, f"{mean_of(scores, 'mean'):.3f}", plus_minus([r["difference"] for r in rows], "+.3f"), over_ppo]
    at_most = "<= " if rows[0].get("kl_is_bound") else ""
    cells += [plus_minus(wins, ".1%"), plus_minus([r["against_references"] for r in rows], ".1%")]
    cells += [f"{at_most}{mean_of([r['kl'] for r in rows], 'mean'):.2f}"]
    return cells + [f"{mean_of(rows, name):.3g}" for name in ("perplexity", "distinct2", "length")]


def policies(results: Results) -> str:
    """M1, its best of n, plain PPO, and a row per variant."""
    titles = ["policy", "expert score", "gain over M1", "over plain PPO", "win rate", "against references"]
    titles += ["KL (nats)", "perplexity under M1", "distinct-2", "tokens"]
    plain = [result["plain"] for result in next(iter(results.values()))]
    rows = [policy_row(title, [p[name] for p in plain]) for name, title in PLAIN.items() if plain[0][name]]
    for name, runs in results.items():
        rows.append(policy_row(VARIANTS[name].title, runs, plus_minus([r["over_ppo"] for r in runs], "+.3f")))
    return markdown(titles, rows)


def reward_models(results: Results) -> str:
    """How often the reward model agrees with the expert, before the refresh and after it."""
    agreements = {name: [result["agreement"] for result in runs] for name, runs in results.items()}
    measured = [
        on
        for on in (HELD_OUT, AGAINST_M1, OF_PPO, OF_REFRESHED)
        if any(a[on] for runs in agreements.values() for a in runs)
    ]
    titles = ["reward model", *(title for on in measured for title in (f"{on}: before", "after"))]
    rows = []
    for name, runs in agreements.items():
        cells = [plus_minus([a[on].get(model) for a in runs]) for on in measured for model in ("r", "refreshed")]
        rows.append([VARIANTS[name].title, *cells])
    return markdown(titles, rows)


def table(results: Results) -> str:
    """Both tables, and how to read them."""
    legend = "+- a, b: standard error over the seeds, and over the prompts within them (paired); with one seed b alone."
    return f"{policies(results)}\n\n{reward_models(results)}\n\n{legend}"


if __name__ == "__main__":
    study(__doc__, list(VARIANTS), run, table)
