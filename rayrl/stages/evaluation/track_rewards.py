"""Stage track_rewards: agreement of the reward models with the oracle, as PPO moves the policy.

arXiv 2403.19279 argues that it is lost along the way and that RLP repairs it, but measures it nowhere. Here the oracle
scores two answers of the policy to each of some held-out prompts at a few points of each PPO, and every reward model
must order them. PPO itself has kept those answers. Costs half of `evaluate.diagnosis_budget`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ray.actor import ActorHandle

from rayrl.algorithms.statistics import order_agreement, paired_difference, spearman
from rayrl.data.blocks import found_table
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.records import Checkpoint, HeldOutAnswer, content_id, from_row
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import PpoMetrics, TrackedPoint, TrackedReward, TrackRewardsMetrics
from rayrl.runs.stage_table import TRACK_REWARDS, Stage
from rayrl.stages.labelling.ask import oracle_scores
from rayrl.stages.labelling.query import oracle_key
from rayrl.stages.policy.ppo import HELD_OUT
from rayrl.stages.rewards.protocol import Reward

MAX_POINTS = 4
"""Of each PPO, besides M1."""
NUM_ANSWERS = 2
"""Of a policy to each held-out prompt."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy along a PPO: two answers to each of some prompts, (prompts, 2)."""

    ppo: Stage[PpoMetrics]
    step: int
    kl: float
    """Nats per response, of the rollout before it."""
    answers: list[list[HeldOutAnswer]]


def track_rewards(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    ppos: Mapping[Stage[PpoMetrics], Checkpoint],
    rewards: Mapping[str, Reward],
) -> Manifest[TrackRewardsMetrics] | None:
    """Measure the oracle's mean score at each point, and each reward's mean, accuracy and rank correlation.

    None if nothing is to be paid.

    Args:
        run: the run.
        services: serve the rewards.
        oracle: scores the answers.
        ppos: by PPO the policy it ended in, in order.
        rewards: by name.
    """
    if not TRACK_REWARDS.occurs(run.config, run.round):
        return None
    versions = [policy.version for policy in ppos.values()]
    key = run.key(TRACK_REWARDS, run.config.evaluate, oracle_key(run), *versions)
    if done := run.finished(TRACK_REWARDS, key):
        return done
    started = time.monotonic()
    budget = run.config.evaluate.diagnosis_budget // 2  # audit_pairs has the other half
    points = find_points(run, list(ppos), budget)
    answers: list[HeldOutAnswer] = []
    for point in points:
        for pair in point.answers:
            answers += pair

    # Every array of values below is (points, prompts, 2); an abstention is NaN.
    shape = [len(points), -1, NUM_ANSWERS]
    texts = [(answer.prompt_id, answer.prompt, answer.response) for answer in answers]
    scores = oracle_scores(oracle, texts, TRACK_REWARDS, describe="asking about answers along PPO")
    by_oracle = np.array(scores, float).reshape(shape)
    items = [answer.as_item() for answer in answers]
    # All are started before the first is asked, so that their engines come up side by side.
    served = {name: reward.serve(services) for name, reward in rewards.items()}
    by_reward = {name: np.array(reward.score(items), float).reshape(shape) for name, reward in served.items()}

    tracked: list[TrackedPoint] = []
    for i, point in enumerate(points):
        tracked.append(measure_point(point, by_oracle[i], {name: values[i] for name, values in by_reward.items()}))
    num_scored = int(np.isfinite(by_oracle).sum())
    return run.finish(
        TRACK_REWARDS,
        key,
        since=started,
        num_rows=len(answers),
        metrics=TrackRewardsMetrics(points=tracked, num_answers=len(answers), num_scored=num_scored),
        summary=f"{num_scored} answers of {len(points)} policies scored by the oracle",
    )


def find_points(run: Run, ppos: Sequence[Stage[PpoMetrics]], budget: int) -> list[Point]:
    """Choose M1 and evenly spaced measured steps of every PPO, the last among them.

    Each point has as many prompts as the budget is for. The second PPO starts from M1 as well: its first point is left
    out.
    """
    places = [(ppos[0], 0, 0.0)]  # M1 has no distance to itself
    for ppo in ppos:
        kls = measured_kls(run, ppo)
        steps = sorted(kls)
        num_points = min(MAX_POINTS, len(steps))
        chosen = np.unique(np.linspace(0, len(steps) - 1, num_points).round().astype(int))
        for i in chosen:
            places.append((ppo, steps[i], kls[steps[i]]))
    num_prompts = max(1, budget // (NUM_ANSWERS * len(places)))
    points: list[Point] = []
    for ppo, step, kl in places:
        answers = read_answers(run.folder(ppo, HELD_OUT, str(step)))
        points.append(Point(ppo=ppo, step=step, kl=kl, answers=answers[:num_prompts]))
    return points


def measured_kls(run: Run, ppo: Stage[PpoMetrics]) -> dict[int, float]:
    """Read the KL at every step of a PPO that answered the held-out prompts."""
    kls: dict[int, float] = {}
    for row in read_metrics(run.curve(ppo)):
        if row["step"] > 0 and row.get("held_out_reward") is not None:
            kls[row["step"]] = row["kl"]
    return kls


def read_answers(folder: str) -> list[list[HeldOutAnswer]]:
    """Read both answers to each held-out prompt, as a PPO keeps them in a folder at each measured step.

    Prompts come in an order that follows from their ids alone.
    """
    # A block per rank of the PPO, which may have had another number of them than the config says now.
    table = found_table(folder)
    by_prompt: dict[str, list[HeldOutAnswer]] = {}
    for block in table.blocks():
        for row in block.to_pylist():
            by_prompt.setdefault(row["prompt_id"], []).append(from_row(row, HeldOutAnswer))
    # Whatever the number of ranks, and the same prompts at every point: only the policy differs between them.
    prompt_ids = sorted(by_prompt, key=lambda prompt_id: content_id("tracked", prompt_id))
    return [by_prompt[prompt_id] for prompt_id in prompt_ids]


def measure_point(point: Point, by_oracle: np.ndarray, by_reward: Mapping[str, np.ndarray]) -> TrackedPoint:
    """Compare (prompts, 2) scores of the oracle and of each reward at one point; NaN abstains."""
    rewards: dict[str, TrackedReward] = {}
    for name, values in by_reward.items():
        both = np.isfinite(by_oracle) & np.isfinite(values)
        rewards[name] = TrackedReward(
            mean=float(np.nanmean(values)) if np.isfinite(values).any() else None,
            accuracy=order_agreement(by_oracle, values),
            spearman=spearman(values[both], by_oracle[both]),
        )
    scored = by_oracle[np.isfinite(by_oracle)]
    return TrackedPoint(
        ppo=point.ppo.name,
        step=point.step,
        kl=point.kl,
        oracle_score=paired_difference(scored, np.zeros(len(scored))) if len(scored) else None,
        rewards=rewards,
    )
