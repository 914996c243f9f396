"""Study of PPO's advantages: with a value function, and from groups of responses, at the same number of responses.

    python jobs/bench/study_advantages.py jobs/configs/rlp_quickstart.toml [section.key=value ...] --seeds 0 1 2

Plain RLHF: every variant trains M1 by PPO on the same reward model, which the first variant fits. A rollout has as many
responses as the config's, of `GROUP` to each prompt or of one to each, and there are as many rollouts. Runs go into
RUN_DIR/advantages-<variant>-<seed>; rerun it to continue an interrupted study.
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from plain_rlhf import first_ppo_only
from seeds import Result, finish, finished_metrics, markdown, measured, paired, plus_minus, study

from rayrl.algorithms.estimate import Estimate
from rayrl.config import RunConfig, load_config
from rayrl.config.ppo import VALUE_SETTINGS, PpoConfig
from rayrl.runs import storage
from rayrl.runs.stage_metrics import PolicyEvaluation, PpoMetrics
from rayrl.runs.stage_table import EVALUATE, POOL, PPO
from rayrl.study.run_measures import oracle_scores

BASE = "gae"
"""The variant whose stages before PPO the others take over, and with which they are compared."""
GROUP = 4
"""Responses to a prompt."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    title: str
    advantages: str
    k: int = GROUP


VARIANTS = {
    BASE: Variant(title="GAE, 1 response per prompt", advantages="gae", k=1),
    "gae-groups": Variant(title=f"GAE, {GROUP} responses per prompt", advantages="gae"),
    "rloo": Variant(title=f"RLOO, {GROUP} responses", advantages="rloo"),
    "group-mean": Variant(title=f"group mean, {GROUP} responses", advantages="group_mean"),
    "group-normalised": Variant(title=f"group mean and deviation, {GROUP} responses", advantages="group_normalised"),
}


@dataclass(frozen=True, kw_only=True)
class AdvantagesResult(Result):
    """Result of one run."""

    evaluation: PolicyEvaluation
    ppo: PpoMetrics
    over_base: Estimate


def config_of(options: argparse.Namespace, name: str, seed: int) -> RunConfig:
    """Load the config of a variant: as many rollouts of as many responses as the config has."""
    variant = VARIANTS[name]
    config = load_config(options.config, [*options.overrides, f"seed={seed}"])
    ppo = config.ppo
    settings = ppo.model_dump(exclude=set() if variant.advantages == "gae" else set(VALUE_SETTINGS))
    settings |= {"advantages": variant.advantages, "k": variant.k}
    if variant.k > 1:
        # A pass over the pool has k times as many rollouts of fewer prompts.
        num_rollouts = ppo.num_rollouts(num_prompts(options, seed))
        settings |= {"rollout_size": ppo.rollout_size // variant.k, "max_rollouts": num_rollouts}
    folder = storage.join(storage.absolute(config.run_dir), f"advantages-{name}-{seed}")
    shared = None if name == BASE else config_of(options, BASE, seed).run_dir
    update = {"name": f"{config.name}-{name}-{seed}", "run_dir": folder, "reuse": shared}
    return config.model_copy(update=update | {"ppo": PpoConfig.model_validate(settings)})


def num_prompts(options: argparse.Namespace, seed: int) -> int:
    """Read the number of training prompts from the first variant's pool."""
    return finished_metrics(config_of(options, BASE, seed).run_dir, POOL).num_prompts


def run(options: argparse.Namespace, name: str, seed: int) -> AdvantagesResult:
    """Run a variant, after the first one; return what its policy is, and where its time went."""
    base = finish(config_of(options, BASE, seed), first_ppo_only)
    folder = finish(config_of(options, name, seed), first_ppo_only)
    evaluation = finished_metrics(folder, EVALUATE).policies["ppo"]
    return AdvantagesResult(
        difference=measured(evaluation.difference, "the gain"),
        evaluation=evaluation,
        ppo=finished_metrics(folder, PPO),
        over_base=paired(oracle_scores(folder, "ppo"), oracle_scores(base, "ppo")),
    )


def table(results: Mapping[str, list[AdvantagesResult]]) -> str:
    """Make the table: a row per variant."""
    titles = ["advantages", "responses", "gain over M1", "over GAE", "win rate", "reward", "KL (nats)", "training, s"]
    rows: list[list[str]] = []
    for name, runs in results.items():
        cells = [
            VARIANTS[name].title,
            " ".join(str(result.ppo.num_responses) for result in runs),
            plus_minus([result.difference for result in runs], "+.3f"),
            "" if name == BASE else plus_minus([result.over_base for result in runs], "+.3f"),
            plus_minus([result.evaluation.win_rate for result in runs], ".1%"),
            f"{statistics.mean(result.ppo.final_reward for result in runs):.3f}",
            f"{statistics.mean(measured(result.evaluation.kl, 'KL').mean for result in runs):.2f}",
            f"{statistics.mean(result.ppo.train_s for result in runs):.1f}",
        ]
        rows.append(cells)
    legend = "+- a, b: standard error over the seeds, and over the prompts within them (paired); with one seed b alone."
    return f"{markdown(titles, rows)}\n\n{legend}"


if __name__ == "__main__":
    study(__doc__, list(VARIANTS), run, table)
