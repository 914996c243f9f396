"""Study of reward learning on policy: the method beside its controls, over several seeds.

    python jobs/bench/study_rlp.py jobs/configs/rlp_stories.toml [section.key=value ...] --seeds 0 1 2

Runs every variant with every seed into RUN_DIR/<variant>-<seed>. Stages that all have in common (M1, the preferences,
r, the first PPO and its samples) are done once per seed, by the first variant. Prints one table of policies and one of
reward models. Rerun it to continue an interrupted study.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from plain_rlhf import plain_rlhf
from ray.actor import ActorHandle
from seeds import Result, finish, finished_metrics, markdown, measured, pooled, stage_metrics, study

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.statistics import paired_difference
from rayrl.config import load_config
from rayrl.fleets.services import Services
from rayrl.pipelines.rlp import rlp
from rayrl.pipelines.run_pipeline import Pipeline
from rayrl.report.tables import read_parquet
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import EvaluateMetrics, PolicyEvaluation, RewardModelMetrics, TrackRewardsMetrics
from rayrl.runs.stage_table import (
    EVALUATE,
    FIT_REWARD_MODEL,
    PPO,
    PPO_REFRESHED,
    REFIT_REWARD_MODEL,
    TRACK_REWARDS,
    Stage,
)
from rayrl.stages.evaluation.evaluate import evaluate

BASE = "spg"
"""The variant that runs the stages that all have in common."""
PLAIN = {"m1": "M1", "best_of_n": "M1, best of n by r", "ppo": "plain PPO"}
"""Policies of its run that are rows of their own; the second only with `evaluate.best_of_n`."""
HELD_OUT, AGAINST_M1 = "held-out pairs", "PPO's answers against M1's"
PPO_PAIRS, REFRESHED_PAIRS = "pairs of PPO's answers", "pairs of the new policy's answers"
REWARD_MODELS: dict[str, Stage[RewardModelMetrics]] = {"r": FIT_REWARD_MODEL, "refreshed": REFIT_REWARD_MODEL}


def first_ppo_only(run: Run, services: Services, oracle: ActorHandle) -> Manifest[EvaluateMetrics]:
    """Run plain RLHF and its evaluation: for variants that change the first reward, without a refresh."""
    done = plain_rlhf(run, services, oracle)
    policies = {"m1": done.m1, "ppo": done.policy}
    return evaluate(run, services, oracle, done.pool, policies, {"r": done.r})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    title: str
    overrides: tuple[str, ...]
    policy: str = "rlp"
    """Policy of its run that is the row."""
    pipeline: Pipeline = rlp
    shared: str | None = BASE
    """Variant whose stages it takes over."""


def refreshed(title: str, *overrides: str) -> Variant:
    """Make a variant that refreshes the reward model in another way."""
    return Variant(title=title, overrides=overrides)


def ensemble(objective: str, shared: str = "ensemble-mean") -> Variant:
    """Make a variant of PPO on an ensemble, whose members do not depend on the objective."""
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
    """Finish a variant's run, after the run it shares stages with; return its folder."""
    variant = VARIANTS[name]
    shared = finished(options, variant.shared, seed) if variant.shared else None
    config = load_config(options.config, [*options.overrides, *variant.overrides, f"seed={seed}"])
    folder = storage.join(config.run_dir, f"{name}-{seed}")
    update = {"name": f"{config.name}-{name}-{seed}", "run_dir": folder, "reuse": shared}
    return finish(config.model_copy(update=update), variant.pipeline)


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """Measurements of one policy."""

    evaluation: PolicyEvaluation
    against_references: Estimate | None
    """None without a table of reference answers."""


@dataclass(frozen=True, kw_only=True)
class RefreshResult(Result):
    """Result of one run, beside M1 and plain PPO of the same seed."""

    policy: PolicyResult
    plain: dict[str, PolicyResult]
    """By name, those of `PLAIN` that were evaluated."""
    over_ppo: Estimate
    agreement: dict[str, dict[str, Estimate | None]]
    """Share of pairs on which a reward model agrees with the oracle: by the pairs, then by the reward model."""


def run(options: argparse.Namespace, name: str, seed: int) -> RefreshResult:
    """Run a variant; return the measurements of its policy and reward models, beside M1 and plain PPO of that seed."""
    policy = VARIANTS[name].policy
    base, folder = finished(options, BASE, seed), finished(options, name, seed)
    plain = policies_of(finished_metrics(base, EVALUATE))
    evaluated = finished_metrics(folder, EVALUATE)
    ours, tracked = policies_of(evaluated)[policy], stage_metrics(folder, TRACK_REWARDS)
    held_out: dict[str, Estimate | None] = {}
    against_m1: dict[str, Estimate | None] = {}
    for reward, stage in REWARD_MODELS.items():
        model = stage_metrics(folder, stage)
        held_out[reward] = None if model is None else model.validation.accuracy
        agreements = evaluated.rewards.get(reward, {})
        against_m1[reward] = agreements["ppo"].accuracy if "ppo" in agreements else None
    return RefreshResult(
        difference=measured(ours.evaluation.difference, "the gain"),
        policy=ours,
        plain={name: plain[name] for name in PLAIN if name in plain},
        over_ppo=paired(oracle_scores(folder, policy), oracle_scores(base, "ppo")),
        agreement={
            HELD_OUT: held_out,
            AGAINST_M1: against_m1,
            PPO_PAIRS: at_the_end(tracked, PPO),
            REFRESHED_PAIRS: at_the_end(tracked, PPO_REFRESHED),
        },
    )


def policies_of(evaluated: EvaluateMetrics) -> dict[str, PolicyResult]:
    """Return the measurements of every policy, with its win rate against the reference answers, if there are any."""
    beside = {} if evaluated.references is None else evaluated.references.policies
    return {
        name: PolicyResult(evaluation=evaluation, against_references=beside[name].win_rate if name in beside else None)
        for name, evaluation in evaluated.policies.items()
    }


def at_the_end(tracked: TrackRewardsMetrics | None, ppo: Stage) -> dict[str, Estimate | None]:
    """Return each reward model's accuracy on pairs of the final policy's answers; empty without a diagnosis budget."""
    points = [] if tracked is None else [point for point in tracked.points if point.ppo == ppo.name]
    return {name: reward.accuracy for name, reward in points[-1].rewards.items()} if points else {}


def oracle_scores(folder: str, policy: str) -> dict[str, float]:
    """Read the oracle's score of a policy's answer, by prompt."""
    table = read_parquet(storage.join(folder, "stages", EVALUATE.name, "table"))
    assert table is not None, f"{folder} has no table of answers"
    rows = zip(table["prompt_id"].to_pylist(), table[f"{policy}_score"].to_pylist(), strict=True)
    return {prompt: score for prompt, score in rows if score is not None}


def paired(ours: dict[str, float], theirs: dict[str, float]) -> Estimate:
    """Estimate the mean difference over the prompts that both have."""
    both = sorted(ours.keys() & theirs.keys())
    return paired_difference(np.array([ours[p] for p in both]), np.array([theirs[p] for p in both]))


def plus_minus(estimates: Sequence[Estimate | None], pattern: str = ".3f") -> str:
    """Format mean +- standard error over seeds (if there are several), over prompts; "-" without an estimate."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return "-"
    mean, between, within = pooled(known)
    errors = [f"{error:{pattern.removeprefix('+')}}" for error in (between, within) if not math.isnan(error)]
    return f"{mean:{pattern}} +- {', '.join(errors)}"


def policy_row(title: str, policies: list[PolicyResult], over_ppo: str = "-") -> list[str]:
    """Make the table's cells of a policy from its evaluations with every seed."""
    rows = [policy.evaluation for policy in policies]
    score = statistics.mean(measured(row.score, "the score").mean for row in rows)
    kl = statistics.mean(measured(row.kl, "KL").mean for row in rows)
    at_most = "<= " if rows[0].kl_is_bound else ""
    return [
        title,
        f"{score:.3f}",
        plus_minus([row.difference for row in rows], "+.3f"),
        over_ppo,
        plus_minus([row.win_rate for row in rows], ".1%"),
        plus_minus([policy.against_references for policy in policies], ".1%"),
        f"{at_most}{kl:.2f}",
        f"{statistics.mean(measured(row.perplexity, 'perplexity') for row in rows):.3g}",
        f"{statistics.mean(row.distinct2 for row in rows):.3g}",
        f"{statistics.mean(row.length for row in rows):.3g}",
    ]


def policies(results: Mapping[str, list[RefreshResult]]) -> str:
    """Make the table of policies: M1, its best of n, plain PPO, and a row per variant."""
    titles = ["policy", "oracle score", "gain over M1", "over plain PPO", "win rate", "against references"]
    titles += ["KL (nats)", "perplexity under M1", "distinct-2", "tokens"]
    plain = [result.plain for result in next(iter(results.values()))]
    rows = [policy_row(title, [found[name] for found in plain]) for name, title in PLAIN.items() if name in plain[0]]
    for name, runs in results.items():
        over_ppo = plus_minus([result.over_ppo for result in runs], "+.3f")
        rows.append(policy_row(VARIANTS[name].title, [result.policy for result in runs], over_ppo))
    return markdown(titles, rows)


def reward_models(results: Mapping[str, list[RefreshResult]]) -> str:
    """Make the table of how often the reward model agrees with the oracle, before the refresh and after it."""
    every = [result for runs in results.values() for result in runs]
    compared = [
        pairs
        for pairs in (HELD_OUT, AGAINST_M1, PPO_PAIRS, REFRESHED_PAIRS)
        if any(result.agreement[pairs] for result in every)
    ]
    titles = ["reward model", *(title for pairs in compared for title in (f"{pairs}: before", "after"))]
    rows: list[list[str]] = []
    for name, runs in results.items():
        cells = [VARIANTS[name].title]
        for pairs in compared:
            for reward in REWARD_MODELS:
                cells.append(plus_minus([result.agreement[pairs].get(reward) for result in runs]))
        rows.append(cells)
    return markdown(titles, rows)


def table(results: Mapping[str, list[RefreshResult]]) -> str:
    """Join both tables and a legend."""
    legend = "+- a, b: standard error over the seeds, and over the prompts within them (paired); with one seed b alone."
    return f"{policies(results)}\n\n{reward_models(results)}\n\n{legend}"


if __name__ == "__main__":
    study(__doc__, list(VARIANTS), run, table)
