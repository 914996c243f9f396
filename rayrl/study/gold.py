"""Gold scores along PPO: the oracle's scores of the answers to held-out prompts that a PPO keeps as it goes on.

PPO has sampled them to measure its own reward. They are scored after the training, outside of the ledger: the oracle
must be one that costs nothing, a function or a table.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence

from rayrl.config import OracleBase, RunConfig
from rayrl.errors import DataError
from rayrl.metrics.curves import CurveRow, read_metrics
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.protocol import Oracle
from rayrl.records import HeldOutAnswer
from rayrl.runs import storage
from rayrl.runs.run import round_folder
from rayrl.runs.stage_metrics import PpoMetrics
from rayrl.runs.stage_table import PPO, PPO_REFRESHED, Stage
from rayrl.stages.evaluation.track_rewards import read_answers
from rayrl.stages.policy.ppo import HELD_OUT
from rayrl.study.results import GoldPoint

PPOS: Mapping[str, Stage[PpoMetrics]] = {"ppo": PPO, "rlp": PPO_REFRESHED}
"""Stage that a policy is trained by, by the policy's name in the first round."""

Text = tuple[str, str]
"""A prompt and a response to it."""


def measure_gold(folder: str, config: RunConfig, policy: str, num_answers: int) -> list[GoldPoint]:
    """Score the answers of a finished run's policy at every measured step of its PPO; empty for one without a PPO.

    Args:
        folder: the run.
        config: of the run; its oracle is the gold expert.
        policy: as the run's evaluation names it.
        num_answers: answers to score at each step, two to a prompt; at most those that were kept.

    Raises:
        DataError: the expert fails, or scores nothing of M1's.
    """
    name, _, number = policy.partition("-")
    if name not in PPOS:
        return []
    url = round_folder(folder, int(number or 1))
    stage = PPOS[name]
    kls = policy_kls(read_metrics(storage.join(url, "metrics", f"{stage.name}.jsonl")))
    answers = {step: _answers(url, stage, step, num_answers) for step in kls}
    texts = {(answer.prompt, answer.response) for of_step in answers.values() for answer in of_step}
    scores = asyncio.run(_scores(config.oracle, build_oracle(config.oracle, load_rubric(config.rubric)), sorted(texts)))
    by_step = {step: _by_prompt(of_step, scores) for step, of_step in answers.items()}
    rewards = {step: [a.reward for a in of_step if a.reward is not None] for step, of_step in answers.items()}
    if not by_step.get(0):
        raise DataError(
            f"{url}: the gold expert must score M1's answers, which {stage.name} has kept, and has scored none; run "
            "the study with gold_answers = 0, or mend the oracle"
        )
    return [_point(step, kls[step], rewards[step], by_prompt, by_step[0]) for step, by_prompt in by_step.items()]


def policy_kls(curve: Sequence[CurveRow]) -> dict[int, float]:
    """KL to M1 of the policy at every step of a PPO whose answers were kept, nats per response.

    A rollout's KL is that of the weights which wrote it, those after an earlier step. Of the last step no rollout
    follows: it has the last one's, a step too early.
    """
    rollouts = [row for row in curve if row["step"] > 0 and row["kl"] is not None]
    # An estimate may be below 0 next to M1.
    by_weights = {int(row["step"] - 1 - row["updates_behind"]): max(0.0, row["kl"]) for row in rollouts}
    by_weights[0] = 0.0  # M1 has no distance to itself
    last = by_weights[max(by_weights)]
    measured = [int(row["step"]) for row in curve if "held_out_reward" in row]
    return {step: by_weights.get(step, last) for step in measured}


def _answers(url: str, stage: Stage[PpoMetrics], step: int, num_answers: int) -> list[HeldOutAnswer]:
    by_prompt = read_answers(storage.join(url, "stages", stage.name, HELD_OUT, str(step)))
    return [answer for both in by_prompt for answer in both][:num_answers]


async def _scores(config: OracleBase, oracle: Oracle, texts: Sequence[Text]) -> dict[Text, float | None]:
    """Have the expert score each text once; None where it abstains.

    Raises:
        DataError: the expert itself fails.
    """
    oracle.check()
    slots = asyncio.Semaphore(config.max_concurrency)

    async def score(text: Text) -> float | None:
        async with slots:
            verdict = await oracle.judge(*text)
        if verdict.failure:
            raise DataError(f"the gold expert failed: {verdict.failure}")
        return verdict.score

    return dict(zip(texts, await asyncio.gather(*map(score, texts)), strict=True))


def _by_prompt(answers: Sequence[HeldOutAnswer], scores: Mapping[Text, float | None]) -> dict[str, float]:
    """Mean score of the answers to each prompt; abstentions are left out."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        score = scores[answer.prompt, answer.response]
        if score is not None:
            found.setdefault(answer.prompt_id, []).append(score)
    return {prompt: math.fsum(values) / len(values) for prompt, values in found.items()}


def _point(
    step: int, kl: float, rewards: Sequence[float], by_prompt: Mapping[str, float], of_m1: Mapping[str, float]
) -> GoldPoint:
    """Compare a policy with M1 on the prompts that both have a score of."""
    gains = [score - of_m1[prompt] for prompt, score in by_prompt.items() if prompt in of_m1]
    mean = _mean(gains)
    squares = math.fsum((gain - mean) ** 2 for gain in gains)
    return GoldPoint(
        step=step,
        kl=kl,
        score=_mean(list(by_prompt.values())),
        reward=_mean(rewards),
        gain=mean,
        standard_error=math.sqrt(squares / (len(gains) - 1) / len(gains)) if len(gains) > 1 else math.inf,
        num=len(gains),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
