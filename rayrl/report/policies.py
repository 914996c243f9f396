"""Names and titles of a run's policies and rewards, and what each policy was trained by and on.

Names are those of the metrics of `evaluate`: m1 and m2; or m1, ppo, rlp, in later rounds ppo-2, rlp-2, and best_of_n.
"""

from collections.abc import Collection
from dataclasses import dataclass

from rayrl.config import RunConfig
from rayrl.report.recorded_run import title
from rayrl.runs.run import round_name
from rayrl.runs.stage_metrics import BEST_OF_N, M1
from rayrl.runs.stage_table import (
    DPO,
    PPO,
    PPO_REFRESHED,
    Stage,
    fits_evaluator,
)


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy:
    """A policy that each round trains; proxy DPO keeps only that of its last round."""

    name: str
    """Its name in the first round's evaluation ("ppo"); later rounds add "-2"."""
    title: str
    stage: Stage
    """Its training."""
    reward: str | None
    """Name of the reward that it was trained on; None where only the oracle's own labels taught it."""


def trained_policies(config: RunConfig) -> list[TrainedPolicy]:
    """List the policies of one round in the order of their training; the last is what the run is for."""
    if config.pipeline == "proxy_dpo":
        reward = "evaluator" if fits_evaluator(config) else None
        return [TrainedPolicy(name="m2", title="M2", stage=DPO, reward=reward)]
    if not config.learns_from_comparisons:
        return [TrainedPolicy(name="ppo", title="PPO", stage=PPO, reward="reward")]
    is_refreshed = config.refresh.method != "none"
    return [
        TrainedPolicy(name="ppo", title="plain PPO", stage=PPO, reward="r"),
        TrainedPolicy(
            name="rlp",
            title="RLP" if is_refreshed else "second PPO",
            stage=PPO_REFRESHED,
            reward="refreshed" if is_refreshed else "r",
        ),
    ]


def ppo_titles(config: RunConfig) -> dict[str, str]:
    """Titles of the PPO trainings of one round, by the name of the stage."""
    if not config.learns_from_comparisons:
        return {PPO.name: "PPO"}
    is_refreshed = config.refresh.method != "none"
    second = "PPO on the refreshed reward" if is_refreshed else "second PPO on the old reward model"
    return {PPO.name: "plain PPO", PPO_REFRESHED.name: second}


def policy_titles(config: RunConfig, evaluated: Collection[str] | None) -> dict[str, str]:
    """Titles of the policies that were evaluated, by name, M1 first; of one round's before the evaluation (None)."""
    trained = trained_policies(config)
    titles = {M1: "M1"} | {policy.name: policy.title for policy in trained}
    if evaluated is None:
        return titles
    for number in range(2, config.rounds + 1):
        for policy in trained:
            # "plain" tells PPO on the unrefreshed reward from RLP; a later round's reward knows earlier policies.
            name = "PPO" if policy.stage is PPO else policy.title
            titles[round_name(policy.name, number)] = title(name, number)
    titles[BEST_OF_N] = f"M1, best of {config.evaluate.best_of_n}"
    # A benchmark's own pipeline may evaluate a policy that has no title here.
    known = {name: shown for name, shown in titles.items() if name in evaluated}
    return known | {name: name for name in evaluated if name not in titles}


def reward_titles(config: RunConfig) -> dict[str, str]:
    """Titles of the rewards of one round, by name."""
    if config.pipeline == "proxy_dpo":
        return {"evaluator": "the evaluator"} if fits_evaluator(config) else {}
    if not config.learns_from_comparisons:
        return {"reward": f"the {config.ppo.reward}"}
    return {"r": "r", "refreshed": "refreshed"} if config.refresh.method != "none" else {"r": "r"}


def latest(found: Collection[str], name: str, num_rounds: int) -> str:
    """Name the last round's policy or reward of this name among those found; the first round's if none is."""
    # Not every round has every one: pairs of a file teach r only once.
    for number in range(num_rounds, 0, -1):
        if round_name(name, number) in found:
            return round_name(name, number)
    return name
