"""Stage fit_evaluator: the proxy M_eval, trained on the paid judgements and validated on a held-out slice of them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.algorithms.statistics import accuracy_within, calibration_table, spearman
from rayrl.config import EvaluatorConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import context_length, encode_response, load_tokenizer
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import Rubric, evaluator_target, load_rubric, whole_score
from rayrl.records import Checkpoint, Judgement, Said, content_id
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Judgements
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.stages.rewards.evaluator import Evaluator, Scored, judge_prompt_tokens
from rayrl.training.evaluator import ScalarJob, train_scalar
from rayrl.training.reward_model import RewardModelJob, train_reward_model
from rayrl.training.sft import SftJob, train_sft

MIN_JUDGEMENTS = 4


def fit_evaluator(run: Run, services: Services, m1: Checkpoint, judgements: Sequence[Judgements]) -> Checkpoint | None:
    """M_eval from the judgements of all rounds so far; the manifest carries what it is worth on those it has not seen.

    None under the controls "direct" and "expert": there only the expert labels.
    """
    config = run.config
    if config.labels in ("direct", "expert"):
        return None
    paid = [of_round.key for of_round in judgements]
    key = run.key("fit_evaluator", config.evaluator, config.labels, config.select.pooling, *paid, m1.version)
    checkpoint = Checkpoint(path=run.folder("fit_evaluator", "checkpoint"), version=f"evaluator-{key}")
    if run.finished("fit_evaluator", key):
        return checkpoint
    started = time.monotonic()
    training, held_out = split(labels(run, judgements), config.evaluator.holdout, config.seed)
    tokens = {said: ids for of_round in judgements for said, ids in of_round.token_ids().items()}
    curve = _fit(run, services, m1, checkpoint, training, tokens)
    validation = _validate(run, services, m1, checkpoint, held_out, tokens)
    rank = validation["spearman"]
    run.finish(
        "fit_evaluator",
        key,
        since=started,
        num_rows=len(training),
        metrics=curve | {"validation": validation},
        summary=f"{len(training)} judgements; on {len(held_out)} held out: Spearman "
        + (f"{rank['mean']:.2f} +- {rank['standard_error']:.2f}" if rank else "undefined")
        + f", within one point {validation['within_one']:.0%}",
    )
    return checkpoint


def labels(run: Run, judgements: Sequence[Judgements]) -> list[Judgement]:
    """The scored judgements; under the control "shuffled" their scores are permuted, so that they say nothing."""
    scored = [judgement for of_round in judgements for judgement in of_round.scored()]
    if len(scored) < MIN_JUDGEMENTS:
        raise DataError(
            f"fit_evaluator needs at least {MIN_JUDGEMENTS} scored judgements, got {len(scored)}: the expert abstained "
            "on the rest; see stages/query for its reasons"
        )
    if run.config.labels != "shuffled":
        return scored
    order = np.random.default_rng(run.config.seed).permutation(len(scored))
    return [
        replace(j, score=scored[i].score, rationale=scored[i].rationale) for j, i in zip(scored, order, strict=True)
    ]


def split(judgements: list[Judgement], holdout: float, seed: int) -> tuple[list[Judgement], list[Judgement]]:
    """Training and held-out judgements; all judgements of one prompt are on one side."""
    prompts = sorted({j.prompt_id for j in judgements}, key=lambda p: content_id("holdout", str(seed), p))
    num_held_out = min(max(1, round(holdout * len(prompts))), len(prompts) - 1)
    held_out = set(prompts[:num_held_out])
    training = [j for j in judgements if j.prompt_id not in held_out]
    return training, [j for j in judgements if j.prompt_id in held_out]


def _fit(
    run: Run,
    services: Services,
    m1: Checkpoint,
    checkpoint: Checkpoint,
    judgements: list[Judgement],
    tokens: Mapping[Said, list[int]],
) -> dict[str, Any]:
    config = run.config
    generative = config.evaluator.type == "generative"
    rows = _generative_rows(run, judgements) if generative else _scalar_rows(config.evaluator, judgements, tokens)
    table = BlockTable(run.folder("fit_evaluator", "table"), 1)
    table.write(0, pa.Table.from_pylist(rows))
    policy = config.policy.model_copy(update={"path": m1.path, "revision": None})
    common: dict[str, Any] = {
        "stage": "fit_evaluator",
        "run_url": run.url,
        "checkpoint_url": checkpoint.path,
        "policy": policy,
        "dtype": services.dtype,
        "seed": config.seed,
        "num_rows": len(rows),
    }
    if generative:
        job, loop = SftJob(training=config.evaluator, **common), train_sft
    elif config.evaluator.loss == "bradley_terry":
        job = RewardModelJob(training=config.evaluator, pooling=config.select.pooling, **common)
        loop = train_reward_model
    else:
        mean_score = float(np.mean([j.score for j in judgements if j.score is not None]))
        job = ScalarJob(evaluator=config.evaluator, pooling=config.select.pooling, mean_score=mean_score, **common)
        loop = train_scalar
    return fit_stage(run, services, "fit_evaluator", loop, job, config.evaluator, stream_of(table, config.seed))


def _generative_rows(run: Run, judgements: list[Judgement]) -> list[dict[str, Any]]:
    config, rubric = run.config, load_rubric(run.config.rubric)
    tokenizer = load_tokenizer(config.policy)
    limit = context_length(run.config.policy)
    scoring = config.evaluator.scoring
    if config.evaluator.balanced:
        judgements = balance(judgements, rubric)
    rows = []
    for j in judgements:
        assert j.score is not None
        prompt = judge_prompt_tokens(tokenizer, config.policy, rubric, j.prompt, j.response, scoring)
        target = encode_response(tokenizer, evaluator_target(rubric, j.score, j.rationale, scoring))
        if len(prompt) + 8 > limit:
            continue
        target = target[: limit - len(prompt)]
        rows.append({"response_id": j.response_id, "prompt_token_ids": prompt, "response_token_ids": target})
    if not rows:
        raise DataError(
            f"no judge prompt fits the context of {limit} tokens: shorten rubric.template or raise policy.max_model_len"
        )
    return rows


def balance(judgements: list[Judgement], rubric: Rubric) -> list[Judgement]:
    """Repeat the judgements of rare scores until every score that occurs is as frequent as the commonest."""
    by_score: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        assert judgement.score is not None
        by_score.setdefault(whole_score(rubric, judgement.score), []).append(judgement)
    most = max(map(len, by_score.values()))
    return [group[i % len(group)] for _, group in sorted(by_score.items()) for i in range(most)]


def _scalar_rows(
    evaluator: EvaluatorConfig, judgements: list[Judgement], tokens: Mapping[Said, list[int]]
) -> list[dict[str, Any]]:
    if evaluator.loss == "regression":
        return [{"response_id": j.response_id, "token_ids": tokens[j.said], "score": j.score} for j in judgements]
    by_prompt: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_prompt.setdefault(judgement.prompt_id, []).append(judgement)
    ordered = [
        (a, b) if (a.score or 0) > (b.score or 0) else (b, a)
        for group in by_prompt.values()
        for a, b in combinations(group, 2)
        if not math.isclose(a.score or 0, b.score or 0)
    ]
    if not ordered:
        raise DataError(
            "evaluator.loss = bradley_terry found no two paid responses of one prompt with different scores"
        )
    return [
        {
            "chosen_id": chosen.response_id,
            "rejected_id": rejected.response_id,
            "chosen_token_ids": tokens[chosen.said],
            "rejected_token_ids": tokens[rejected.said],
        }
        for chosen, rejected in ordered
    ]


def _validate(
    run: Run,
    services: Services,
    m1: Checkpoint,
    evaluator: Checkpoint,
    held_out: list[Judgement],
    tokens: Mapping[Said, list[int]],
) -> dict[str, Any]:
    scorer = Evaluator(checkpoint=evaluator, m1=m1, config=run.config).serve(services)
    items = [Scored(prompt=j.prompt, response=j.response, token_ids=tokens[j.said]) for j in held_out]
    predicted = scorer.score(items)
    both = [(p, j.score) for p, j in zip(predicted, held_out, strict=True) if p is not None and j.score is not None]
    ours, expert = np.array([p for p, _ in both]), np.array([s for _, s in both])
    rank = spearman(ours, expert) if len(both) > 2 else None
    return {
        "num": len(both),
        "num_abstained": len(predicted) - len(both),
        "loss": float(np.mean((ours - expert) ** 2)) if both else None,
        "spearman": asdict(rank) if rank else None,
        "within_one": accuracy_within(ours, expert) if both else 0.0,
        "calibration": calibration_table(ours, expert, num_bins=5) if both else [],
    }
