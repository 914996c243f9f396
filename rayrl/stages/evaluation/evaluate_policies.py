"""Stage evaluate_policies: every policy of a run against M1 in one table, judged on the same held-out prompts."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from rayrl.algorithms.comparisons import queries_per_prompt
from rayrl.algorithms.statistics import Estimate, best_of_n_kl, order_agreement
from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, Scored
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Pool
from rayrl.stages.evaluation.answer_metrics import against, nats, spoken
from rayrl.stages.evaluation.held_out import Answer, answers_of, best_of_n, judge, sampling_of
from rayrl.stages.evaluation.references import against_references, comparer_of
from rayrl.stages.labelling.query import expert_of
from rayrl.stages.rewards.reward_models import Reward

M1, BEST_OF_N = "m1", "best_of_n"


def evaluate_policies(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    pool: Pool,
    policies: Mapping[str, Checkpoint],
    rewards: Mapping[str, Reward],
) -> Manifest:
    """One row per policy: gain over M1, win rates, KL, perplexity, variety; and how well each reward model ranks.

    Args:
        run: the run.
        services: fleets.
        oracle: judges, under the evaluation budget shared by all policies.
        pool: its held-out prompts are answered.
        policies: by name; "m1" is the one compared with.
        rewards: by name; each is asked whether it prefers what the expert prefers, and the first picks the best of n.
    """
    config = run.config
    versions = [policy.version for policy in policies.values()]
    key = run.key("evaluate", config.evaluate, expert_of(run), sampling_of(run), pool.key, *versions, *comparer_of(run))
    if done := run.finished("evaluate", key):
        return done
    started = time.monotonic()
    m1 = policies[M1]
    services.ready(services.generators(m1))
    served = {name: reward.serve(services) for name, reward in rewards.items()}
    answers = {name: answers_of(run, services, m1, policy, pool, name) for name, policy in policies.items()}
    if config.evaluate.best_of_n:
        answers[BEST_OF_N] = best_of_n(run, services, m1, pool, next(iter(served.values())))
    num_judged = min(len(answers[M1]), config.evaluate.budget // queries_per_prompt(len(answers), config.competes_by))
    judged = {name: of_policy[:num_judged] for name, of_policy in answers.items()}
    judge(oracle, [answer for of_policy in judged.values() for answer in of_policy])
    references = against_references(run, oracle, judged)
    rows: dict[str, Any] = {}
    for name, of_policy in answers.items():
        rows[name] = spoken(services, m1, of_policy) | against(answers[M1], of_policy)
        if name == BEST_OF_N:  # M1's own log-probabilities say nothing of it
            bound = Estimate(best_of_n_kl(config.evaluate.best_of_n), 0.0, len(of_policy))
            rows[name] |= {"kl": asdict(bound), "kl_is_bound": True}
    _write(run, answers)
    ledger: Any = ray.get(oracle.summary.remote())
    return run.finish(
        "evaluate",
        key,
        since=started,
        num_rows=num_judged * len(answers),
        metrics={
            "policies": rows,
            "reward_accuracy": {name: _agreement(reward, answers) for name, reward in served.items()},
            "num_judged": num_judged,
            "references": references,
            "ledger": ledger,
        },
        summary="; ".join(f"{name} {_gain(row)}" for name, row in rows.items() if name != M1),
    )


def _agreement(reward: ServedReward, answers: Mapping[str, list[Answer]]) -> dict[str, Any]:
    """By policy: how often a reward orders its answer and M1's to a prompt as the expert does; ties are left out."""
    values = {
        name: np.array(reward.score([_scored(a) for a in of_policy]), float) for name, of_policy in answers.items()
    }
    experts = {name: np.array([a.score for a in of_policy], float) for name, of_policy in answers.items()}
    shares: dict[str, Any] = {}
    for name in answers:
        if name == M1:
            continue
        share = order_agreement(np.stack([experts[M1], experts[name]], 1), np.stack([values[M1], values[name]], 1))
        if share is not None:
            shares[name] = asdict(share)
    return shares


def _scored(answer: Answer) -> Scored:
    return Scored(prompt=answer.prompt, response=answer.text, token_ids=answer.prompt_token_ids + answer.token_ids)


def _gain(row: dict[str, Any]) -> str:
    gain = row["difference"]
    kl = nats(row["kl"])
    return f"{gain['mean']:+.3f} +- {gain['standard_error']:.3f}, {kl}" if gain else f"not judged, {kl}"


def _write(run: Run, answers: Mapping[str, list[Answer]]) -> None:
    columns: dict[str, Any] = {
        "prompt_id": [a.prompt_id for a in answers[M1]],
        "prompt": [a.prompt for a in answers[M1]],
    }
    for name, of_policy in answers.items():
        columns[f"{name}_response"] = [a.text for a in of_policy]
        columns[f"{name}_score"] = pa.array([a.score for a in of_policy], pa.float64())
        columns[f"{name}_num_tokens"] = [len(a.token_ids) for a in of_policy]
    BlockTable(run.folder("evaluate", "table"), 1).write(0, pa.table(columns))
