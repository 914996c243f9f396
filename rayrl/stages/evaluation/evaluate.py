"""Stage evaluate: every policy of a run on the same held-out prompts, judged under a budget of its own.

One table and one schema for both pipelines: M1 first, then each policy that was trained, then (rlp) M1's best of n.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from rayrl.algorithms.comparisons import queries_per_prompt
from rayrl.algorithms.statistics import best_of_n_kl, order_agreement, spearman
from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import BEST_OF_N, M1, EvaluateMetrics, PolicyEvaluation, RewardEvaluation
from rayrl.runs.stage_table import EVALUATE
from rayrl.stages.artifacts import Pool
from rayrl.stages.evaluation.answer_metrics import measure_policy, nats
from rayrl.stages.evaluation.benchmark import benchmark
from rayrl.stages.evaluation.held_out import (
    HeldOut,
    answers_of,
    best_of_n,
    evaluation_sampling,
    judge_answers,
    own_samples,
)
from rayrl.stages.evaluation.references import against_references, comparison_wording
from rayrl.stages.labelling.ask import ledger_counts
from rayrl.stages.labelling.query import oracle_key
from rayrl.stages.rewards.protocol import Reward


def evaluate(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    pool: Pool,
    policies: Mapping[str, Checkpoint],
    rewards: Mapping[str, Reward],
) -> Manifest[EvaluateMetrics]:
    """Compare every policy with M1: gain, win rates, KL, perplexity, variety; and each reward with the oracle.

    Args:
        run: the run.
        services: fleets.
        oracle: judges, under the evaluation budget that all policies share.
        pool: its held-out prompts are answered.
        policies: by name; "m1" is the one compared with.
        rewards: by name: evaluators, reward models, a function. The first one picks the best of n.
    """
    config = run.config
    # Rewards are not in the key: each is in the version of the policy that was trained on it.
    versions = [policy.version for policy in policies.values()]
    judged_by = [oracle_key(run), *comparison_wording(run)]
    sampling = asdict(evaluation_sampling(run)).values()
    key = run.key(EVALUATE, config.evaluate, *judged_by, *sampling, pool.key, *versions)
    if done := run.finished(EVALUATE, key):
        return done
    started = time.monotonic()
    m1 = policies[M1]
    services.ready(services.generators(m1))
    # The trained policies first: the engines then end with M1's weights, under which all answers are read.
    trained = [name for name in policies if name != M1]
    answers: dict[str, list[HeldOut]] = {}
    own: dict[str, list[HeldOut]] = {}
    for name in trained:
        answers[name] = answers_of(run, services, m1, policies[name], pool, name)
        own[name] = own_samples(run, services, m1, policies[name], pool, name, answers[name])
    answers = {M1: answers_of(run, services, m1, m1, pool, M1), **answers}
    if config.best_of_n:
        answers[BEST_OF_N] = best_of_n(run, services, m1, pool, next(iter(rewards.values())).serve(services))

    queries_each = queries_per_prompt(len(answers), config.competes_by)
    # Every policy is judged on the same prompts, as many as the budget pays for whole.
    num_judged = min(len(answers[M1]), config.evaluate.budget // queries_each)
    judged = {name: policy_answers[:num_judged] for name, policy_answers in answers.items()}
    judge_answers(oracle, [answer for policy_answers in judged.values() for answer in policy_answers])
    references = against_references(run, oracle, judged)

    kl_bounds = {BEST_OF_N: best_of_n_kl(config.best_of_n)} if config.best_of_n else {}
    rows = {
        name: measure_policy(services, m1, answers[M1], policy_answers, own=own.get(name), kl_bound=kl_bounds.get(name))
        for name, policy_answers in answers.items()
    }
    metrics = EvaluateMetrics(
        num_judged=num_judged,
        policies=rows,
        # Served only now: in mode "alternate" the engines that were asked above have ended a fleet that was up before.
        rewards={name: _agreement(reward.serve(services), judged) for name, reward in rewards.items()},
        references=references,
        lm_eval=benchmark(run, services, policies) if config.evaluate.lm_eval.tasks else {},
        ledger=ledger_counts(oracle),
    )
    _write_table(run, answers)
    return run.finish(
        EVALUATE,
        key,
        since=started,
        num_rows=num_judged * len(answers),
        metrics=metrics,
        summary="; ".join(_summary(name, row) for name, row in rows.items() if name != M1),
    )


def _agreement(reward: ServedReward, judged: Mapping[str, list[HeldOut]]) -> dict[str, RewardEvaluation]:
    """Compare a reward with the oracle on each policy's judged answers: on their order beside M1's, and on their ranks.

    Whether the reward still ranks well where the policy went is what decides over over-optimisation.
    """
    values = {
        name: np.array(reward.score([answer.as_item() for answer in answers]), float)
        for name, answers in judged.items()
    }
    scores = {name: np.array([answer.score for answer in answers], float) for name, answers in judged.items()}
    agreement: dict[str, RewardEvaluation] = {}
    for name in judged:
        if name == M1:
            continue
        accuracy = order_agreement(np.stack([scores[M1], scores[name]], 1), np.stack([values[M1], values[name]], 1))
        # An abstention of either side is NaN here.
        known = np.isfinite(scores[name]) & np.isfinite(values[name])
        rank = spearman(values[name][known], scores[name][known])
        agreement[name] = RewardEvaluation(accuracy=accuracy, spearman=rank)
    return agreement


def _summary(name: str, row: PolicyEvaluation) -> str:
    gain, kl = row.difference, nats(row.kl)
    if gain is None or row.score is None or row.base_score is None:
        return f"{name} not judged, {kl}"
    return (
        f"{name} oracle score {row.base_score.mean:.2f} -> {row.score.mean:.2f}, gain {gain.mean:+.3f} "
        f"+- {gain.standard_error:.3f} on {gain.num} prompts, {kl}"
    )


def _write_table(run: Run, answers: Mapping[str, list[HeldOut]]) -> None:
    """Write every policy's answer to each held-out prompt, with its score and its number of tokens."""
    columns: dict[str, Any] = {
        "prompt_id": [answer.prompt_id for answer in answers[M1]],
        "prompt": [answer.prompt for answer in answers[M1]],
    }
    for name, policy_answers in answers.items():
        columns[f"{name}_response"] = [answer.text for answer in policy_answers]
        columns[f"{name}_score"] = pa.array([answer.score for answer in policy_answers], pa.float64())
        columns[f"{name}_num_tokens"] = [len(answer.token_ids) for answer in policy_answers]
    BlockTable(run.folder(EVALUATE, "table"), 1).write(0, pa.table(columns))
