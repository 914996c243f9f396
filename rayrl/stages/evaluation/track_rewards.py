"""Stage track_rewards: do the reward models still prefer what the expert prefers, as PPO moves the policy?

arXiv 2403.19279 argues that they do not, and that RLP repairs it, but measures it nowhere. Here the expert scores two
answers of the policy to each of some held-out prompts at a few points of each PPO, and every reward model must order
them. Costs half of `evaluate.diagnosis_budget`.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from rayrl.algorithms.statistics import order_agreement, paired_difference, spearman
from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.records import Checkpoint, HeldOutAnswer, Scored, content_id, from_row
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run
from rayrl.stages.labelling.query import expert_of, expert_scores
from rayrl.stages.policy.ppo import HELD_OUT
from rayrl.stages.rewards.reward_models import Reward

STAGE = "track_rewards"
MAX_POINTS = 4
"""Of each PPO, besides M1."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy on its way: two answers to each of some prompts, (prompts, 2)."""

    ppo: str
    step: int
    kl: float
    """Nats per response, of the rollout before it."""
    answers: list[list[HeldOutAnswer]]


def track_rewards(
    run: Run, services: Services, oracle: ActorHandle, ppos: Mapping[str, Checkpoint], rewards: Mapping[str, Reward]
) -> Manifest | None:
    """At each point the expert's mean score, and each reward's mean, accuracy and rank correlation; None if unpaid.

    Args:
        run: the run.
        services: serve the rewards.
        oracle: scores the answers.
        ppos: the policies they ended in, by stage.
        rewards: by name.
    """
    budget = run.config.evaluate.diagnosis_budget // 2
    if not budget:
        return None
    key = run.key(STAGE, run.config.evaluate, expert_of(run), *(p.version for p in ppos.values()))
    if done := run.finished(STAGE, key):
        return done
    started = time.monotonic()
    points = find_points(run, list(ppos), budget)
    answers = [answer for point in points for pair in point.answers for answer in pair]
    shape = [len(points), -1, 2]
    texts = [(a.prompt_id, a.prompt, a.response) for a in answers]
    scores = expert_scores(oracle, texts, describe="asking about answers along PPO")
    expert = np.array(scores, float).reshape(shape)
    items = [Scored(prompt=a.prompt, response=a.response, token_ids=a.prompt_token_ids + a.token_ids) for a in answers]
    served = {name: reward.serve(services) for name, reward in rewards.items()}
    predicted = {name: np.array(reward.score(items), float).reshape(shape) for name, reward in served.items()}
    measured = [
        {"ppo": point.ppo, "step": point.step, "kl": point.kl}
        | measure_point(expert[i], {name: values[i] for name, values in predicted.items()})
        for i, point in enumerate(points)
    ]
    num_scored = int(np.isfinite(expert).sum())
    return run.finish(
        STAGE,
        key,
        since=started,
        num_rows=len(answers),
        metrics={"points": measured, "num_answers": len(answers), "num_scored": num_scored},
        summary=f"{num_scored} answers of {len(points)} policies scored by the expert",
    )


def find_points(run: Run, ppos: list[str], budget: int) -> list[Point]:
    """M1 and evenly spaced measured steps of every PPO, the last among them; as many prompts as the budget is for.

    The second PPO starts from M1 as well: its first point is left out.
    """
    kls = {ppo: measured_kls(run, ppo) for ppo in ppos}
    places = [(ppos[0], 0, 0.0)]
    for ppo in ppos:
        steps = sorted(kls[ppo])
        chosen = np.unique(np.linspace(0, len(steps) - 1, min(MAX_POINTS, len(steps))).round().astype(int))
        places += [(ppo, steps[i], kls[ppo][steps[i]]) for i in chosen]
    num_prompts = max(1, budget // (2 * len(places)))
    return [
        Point(ppo=ppo, step=step, kl=kl, answers=read_answers(run, ppo, step)[:num_prompts]) for ppo, step, kl in places
    ]


def measured_kls(run: Run, ppo: str) -> dict[int, float]:
    """The KL at every step of a PPO that answered the held-out prompts."""
    curve = read_metrics(storage.join(run.url, "metrics", f"{ppo}.jsonl"))
    return {row["step"]: row["kl"] for row in curve if row["step"] and row.get("held_out_reward") is not None}


def read_answers(run: Run, ppo: str, step: int) -> list[list[HeldOutAnswer]]:
    """Both answers to each held-out prompt, prompts in an order that follows from their ids alone."""
    table = BlockTable(run.folder(ppo, HELD_OUT, str(step)), run.config.ppo.num_workers)
    by_prompt: dict[str, list[HeldOutAnswer]] = {}
    for block in table.blocks():
        for row in block.to_pylist():
            by_prompt.setdefault(row["prompt_id"], []).append(from_row(row, HeldOutAnswer))
    return [by_prompt[prompt] for prompt in sorted(by_prompt, key=lambda prompt: content_id("tracked", prompt))]


def measure_point(expert: np.ndarray, predicted: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What (prompts, 2) scores of the expert and of each reward say of one policy; NaN abstains."""
    scored = expert[np.isfinite(expert)]
    rewards: dict[str, Any] = {}
    for name, values in predicted.items():
        accuracy, both = order_agreement(expert, values), np.isfinite(expert) & np.isfinite(values)
        rank = spearman(values[both], expert[both])
        rewards[name] = {
            "mean": float(np.nanmean(values)) if np.isfinite(values).any() else None,
            "accuracy": asdict(accuracy) if accuracy else None,
            "spearman": asdict(rank) if rank else None,
        }
    score = asdict(paired_difference(scored, np.zeros(len(scored)))) if len(scored) else None
    return {"expert_score": score, "rewards": rewards}
