"""Stage evaluate: what the budget bought. M2 against M1 on held-out prompts, judged under a budget of its own."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from rayrl.actors.services import Services
from rayrl.algorithms import statistics
from rayrl.config import GenerateConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.reading import read_reference_answers
from rayrl.data.tokenizing import context_length, load_tokenizer, render
from rayrl.records import Checkpoint, Sampled, from_row
from rayrl.runs.run import Manifest, Run
from rayrl.stages.benchmark import benchmark
from rayrl.stages.generate import sample_block
from rayrl.stages.pool import Pool
from rayrl.stages.query import ask
from rayrl.stages.score import Scored, make_scorer

MIN_FOR_LENGTH_CONTROL = 20
"""Judged prompts below which the length regression says nothing."""


@dataclass(kw_only=True)
class Answer:
    """One policy's answer to a held-out prompt."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprob: float
    """Under the policy that wrote it."""
    score: float | None = None


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
    key = run.key("evaluate", config.evaluate, pool.key, m1.version, m2.version)
    if done := run.finished("evaluate", key):
        return done
    started = time.monotonic()
    services.ready(services.generators(m1))
    answers2 = _answers(run, services, m1, m2, pool, "m2")
    answers1 = _answers(run, services, m1, m1, pool, "m1")
    references = _references(run)
    sides = 3 if references else 2
    num_judged = min(len(answers1), config.evaluate.budget // sides)
    _judge(oracle, answers1[:num_judged] + answers2[:num_judged])
    metrics = _policies(services, m1, answers1, answers2) | _scores(answers1, answers2)
    if references:
        metrics |= _against_references(oracle, references, answers1[:num_judged], answers2[:num_judged])
    if evaluator is not None:
        metrics["evaluator_spearman"] = _rank_correlation(run, services, m1, evaluator, answers2[:num_judged])
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
        f"KL {metrics['kl']['mean']:.2f} nats"
        if gain
        else f"{len(answers1)} prompts answered, none judged",
    )


def _answers(run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, pool: Pool, name: str) -> list[Answer]:
    """One answer per held-out prompt; both policies draw from the same seeds."""
    config = run.config
    sampling = GenerateConfig(
        **(config.generate.model_dump() | {"k": 1, "source": "policy", "temperature": config.evaluate.temperature})
    )
    table = BlockTable(run.folder("evaluate", f"{name}-{policy.version}"), pool.held_out.num_blocks)
    fleet = services.generators(m1)
    compute = partial(sample_block, pool.held_out, fleet, policy, sampling, config.seed)
    map_blocks(
        table,
        compute,
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress=f"answer {name}",
    )
    rows = [from_row(row, Sampled) for block in table.blocks() for row in block.to_pylist()]
    return [_answer(row) for row in rows]


def _answer(row: Sampled) -> Answer:
    said = row.responses[0] if row.responses else None  # nothing said is an answer too
    return Answer(
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        prompt_token_ids=row.prompt_token_ids,
        text=said.text if said else "",
        token_ids=said.token_ids if said else [],
        logprob=said.logprob if said else 0.0,
    )


def _judge(oracle: ActorHandle, answers: list[Answer]) -> None:
    items = [
        {
            "prompt_id": a.prompt_id,
            "response_id": f"{a.prompt_id}-evaluate-{i}",
            "prompt": a.prompt,
            "response": a.text,
        }
        for i, a in enumerate(answers)
    ]
    for answer, judgement in zip(answers, ask(oracle, items, "evaluate", describe="evaluating"), strict=True):
        answer.score = judgement.score


def _policies(services: Services, m1: Checkpoint, ours1: list[Answer], ours2: list[Answer]) -> dict[str, Any]:
    """What can be said without the expert: KL, perplexity, lengths, diversity."""
    spoken = [a for a in ours2 if a.token_ids]
    under_m1 = services.generators(m1).call(
        "logprobs", m1, [a.prompt_token_ids for a in spoken], [a.token_ids for a in spoken]
    )
    texts1, texts2 = [a.text for a in ours1], [a.text for a in ours2]
    num_tokens1, num_tokens2 = [len(a.token_ids) for a in ours1], [len(a.token_ids) for a in ours2]
    reference = np.array(under_m1)
    return {
        "kl": asdict(statistics.kl_estimate(np.array([a.logprob for a in spoken]), reference)),
        "perplexity_m1": statistics.perplexity(np.array([a.logprob for a in ours1]), np.array(num_tokens1)),
        "perplexity_m2": statistics.perplexity(reference, np.array([len(a.token_ids) for a in spoken])),
        "length_m1": float(np.mean(num_tokens1)),
        "length_m2": float(np.mean(num_tokens2)),
        "distinct2_m1": statistics.distinct_n(texts1, 2),
        "distinct2_m2": statistics.distinct_n(texts2, 2),
        "self_bleu_m1": statistics.self_bleu(texts1),
        "self_bleu_m2": statistics.self_bleu(texts2),
    }


def _scores(answers1: list[Answer], answers2: list[Answer]) -> dict[str, Any]:
    """Mean scores, their paired difference and win rates over the prompts where the expert scored both."""
    both = [(a, b) for a, b in zip(answers1, answers2, strict=True) if a.score is not None and b.score is not None]
    names = ("score_m1", "score_m2", "difference", "win_rate", "length_controlled_win_rate")
    if len(both) < 2:
        return dict.fromkeys(names)
    ours1 = np.array([a.score for a, _ in both], float)
    ours2 = np.array([b.score for _, b in both], float)
    lengths1 = np.array([len(a.text) for a, _ in both])
    lengths2 = np.array([len(b.text) for _, b in both])
    wins = np.where(ours2 > ours1, 1.0, np.where(ours2 < ours1, 0.0, 0.5))
    zero = np.zeros(len(both))
    values = [
        statistics.paired_difference(ours1, zero),
        statistics.paired_difference(ours2, zero),
        statistics.paired_difference(ours2, ours1),
        statistics.win_rate(ours2, ours1),
        statistics.length_controlled_win_rate(wins, lengths2, lengths1)
        if len(both) >= MIN_FOR_LENGTH_CONTROL
        else None,
    ]
    return {name: asdict(value) if value else None for name, value in zip(names, values, strict=True)}


def _references(run: Run) -> dict[str, str]:
    config = run.config
    if config.evaluate.reference_answers is None:
        return {}
    tokenizer = load_tokenizer(config.policy)
    renderer = partial(render, tokenizer, config.policy.prompt_format)
    return {p.id: answer for p, answer in read_reference_answers(config.evaluate.reference_answers, renderer)}


def _against_references(
    oracle: ActorHandle, references: dict[str, str], answers1: list[Answer], answers2: list[Answer]
) -> dict[str, Any]:
    """Win rates of M1 and M2 against the fixed table, on the prompts it answers."""
    fixed = [
        Answer(
            prompt_id=a.prompt_id,
            prompt=a.prompt,
            prompt_token_ids=[],
            text=references[a.prompt_id],
            token_ids=[],
            logprob=0.0,
        )
        for a in answers1
        if a.prompt_id in references
    ]
    _judge(oracle, fixed)
    scores = {a.prompt_id: a.score for a in fixed if a.score is not None}
    rates: dict[str, Any] = {}
    for name, answers in (("m1", answers1), ("m2", answers2)):
        both = [(a.score, scores[a.prompt_id]) for a in answers if a.score is not None and a.prompt_id in scores]
        ours, theirs = np.array([o for o, _ in both], float), np.array([t for _, t in both], float)
        rates[f"win_rate_reference_{name}"] = asdict(statistics.win_rate(ours, theirs)) if len(both) > 1 else None
    return rates


def _rank_correlation(
    run: Run, services: Services, m1: Checkpoint, evaluator: Checkpoint, answers: list[Answer]
) -> dict[str, Any] | None:
    """Does the evaluator still rank well where the policy went?"""
    scored = [a for a in answers if a.score is not None and a.token_ids]
    scorer = make_scorer(run, services, m1, evaluator, context_length(run.config.policy))
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
