"""Stage evaluate: what the budget bought. M2 against M1 on held-out prompts, judged under a budget of its own."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from rayrl.algorithms import statistics
from rayrl.algorithms.comparisons import queries_per_prompt
from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Pool
from rayrl.stages.evaluation.answer_metrics import against, nats, spoken
from rayrl.stages.evaluation.benchmark import benchmark
from rayrl.stages.evaluation.held_out import Answer, answers_of, judge, sampling_of
from rayrl.stages.evaluation.references import against_references, comparer_of
from rayrl.stages.labelling.query import expert_of
from rayrl.stages.rewards.evaluator import Evaluator, Scored


def evaluate(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    pool: Pool,
    *,
    m1: Checkpoint,
    m2: Checkpoint,
    evaluator: Checkpoint | None,
) -> Manifest:
    """Compare M2 with M1 and write the table of both answers to every held-out prompt."""
    config = run.config
    judged_by = [expert_of(run), *comparer_of(run)]
    key = run.key("evaluate", config.evaluate, *judged_by, sampling_of(run), pool.key, m1.version, m2.version)
    if done := run.finished("evaluate", key):
        return done
    started = time.monotonic()
    services.ready(services.generators(m1))
    answers2 = answers_of(run, services, m1, m2, pool, "m2")
    answers1 = answers_of(run, services, m1, m1, pool, "m1")
    num_judged = min(len(answers1), config.evaluate.budget // queries_per_prompt(2, config.competes_by))
    judged = {"m1": answers1[:num_judged], "m2": answers2[:num_judged]}
    judge(oracle, judged["m1"] + judged["m2"])
    of1, of2 = spoken(services, m1, answers1), spoken(services, m1, answers2)
    metrics: dict[str, Any] = {"kl": of2.pop("kl")}
    metrics |= {f"{name}_m{n}": of[name] for n, of in ((1, of1), (2, of2)) for name in of2}
    scores = against(answers1, answers2)
    metrics |= {"score_m1": scores.pop("base_score"), "score_m2": scores.pop("score")} | scores
    metrics["references"] = against_references(run, oracle, judged)
    if evaluator is not None:
        metrics["evaluator_spearman"] = _rank_correlation(run, services, m1, evaluator, judged["m2"])
    if config.evaluate.lm_eval.tasks:
        metrics["lm_eval"] = benchmark(run, services, {"m1": m1, "m2": m2})
    BlockTable(run.folder("evaluate", "table"), 1).write(0, _table(answers1, answers2))
    gain = metrics["difference"]
    return run.finish(
        "evaluate",
        key,
        since=started,
        num_rows=len(answers1),
        metrics=metrics,
        summary=f"expert score {metrics['score_m1']['mean']:.2f} -> {metrics['score_m2']['mean']:.2f}, "
        f"gain {gain['mean']:+.3f} +- {gain['standard_error']:.3f} on {gain['num']} prompts, "
        f"{nats(metrics['kl'])}"
        if gain
        else f"{len(answers1)} prompts answered, none judged",
    )


def _rank_correlation(
    run: Run, services: Services, m1: Checkpoint, evaluator: Checkpoint, answers: list[Answer]
) -> dict[str, Any] | None:
    """Does the evaluator still rank well where the policy went?"""
    scored = [a for a in answers if a.score is not None and a.token_ids]
    scorer = Evaluator(checkpoint=evaluator, m1=m1, config=run.config).serve(services)
    items = [Scored(prompt=a.prompt, response=a.text, token_ids=a.prompt_token_ids + a.token_ids) for a in scored]
    both = [(p, a.score) for p, a in zip(scorer.score(items), scored, strict=True) if p is not None]
    if len(both) < 3:
        return None
    rank = statistics.spearman(np.array([p for p, _ in both]), np.array([s for _, s in both], float))
    return asdict(rank) if rank else None


def _table(answers1: list[Answer], answers2: list[Answer]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [a.prompt_id for a in answers1],
            "prompt": [a.prompt for a in answers1],
            "m1_response": [a.text for a in answers1],
            "m2_response": [a.text for a in answers2],
            "m1_score": pa.array([a.score for a in answers1], pa.float64()),
            "m2_score": pa.array([a.score for a in answers2], pa.float64()),
            "m1_num_tokens": [len(a.token_ids) for a in answers1],
            "m2_num_tokens": [len(a.token_ids) for a in answers2],
        }
    )
