"""Stage fit_evaluator: M_eval, trained on the paid judgements and validated on those of prompts held back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa

from rayrl.algorithms.statistics import accuracy_within, calibration_table, spearman
from rayrl.data.blocks import BlockTable
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.models.served_reward import Reasons
from rayrl.records import Checkpoint, Judgement, ResponseKey, Scored
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import EvaluatorValidation, FitEvaluatorMetrics, FitMetrics
from rayrl.runs.stage_table import FIT_EVALUATOR, fits_evaluator
from rayrl.stages.artifacts import Judgements
from rayrl.stages.fitting import drawn_holdout, fit_stage, stream_of
from rayrl.stages.rewards.evaluator import Evaluator, TrainedEvaluator
from rayrl.stages.rewards.evaluators import evaluator_of
from rayrl.stages.rewards.head_evaluator import HeadEvaluator

MIN_JUDGEMENTS = 4
"""Judgements below which a rank correlation says nothing."""
NUM_CALIBRATION_BINS = 5


def fit_evaluator(run: Run, services: Services, m1: Checkpoint, judgements: Sequence[Judgements]) -> Evaluator | None:
    """Fit M_eval from M1 on the judgements of all rounds so far.

    The manifest says what it is worth on judgements that it has not seen.

    Returns:
        None under the controls "direct" and "expert", where only the oracle labels.

    Raises:
        DataError: too few judgements have a score.
    """
    config = run.config
    if not fits_evaluator(config):
        return None
    paid = [round_judgements.key for round_judgements in judgements]
    # The pooling decides which replicas serve a scalar evaluator, and how its head reads the hidden states.
    # Heads learn from the selection's vectors.
    vectors = config.select.vectors_json() if config.evaluator.type == "head" else config.select.pooling
    content = run.content("select.embedder") if config.evaluator.type == "head" else []
    key = run.key(FIT_EVALUATOR, config.evaluator, config.labels, vectors, *content, *paid, m1.version)
    checkpoint = Checkpoint(path=run.folder(FIT_EVALUATOR, "checkpoint"), version=f"evaluator-{key}")
    evaluator = evaluator_of(run, checkpoint, m1)
    if run.finished(FIT_EVALUATOR, key):
        return evaluator
    started = time.monotonic()
    training, held_out = split(training_judgements(run, judgements), config.evaluator.holdout, run.seed)
    token_ids: dict[ResponseKey, list[int]] = {}
    for round_judgements in judgements:
        token_ids |= round_judgements.token_ids()
    if isinstance(evaluator, HeadEvaluator):
        curve, num_unfit = evaluator.fit(services, training, token_ids), 0
    else:
        assert isinstance(evaluator, TrainedEvaluator)
        curve, num_unfit = _train(run, services, evaluator, training, held_out, token_ids)
    validation = _validate(services, evaluator, held_out, token_ids)
    rank = validation.spearman
    num_too_long = num_unfit + validation.num_too_long
    left_out = f" ({num_too_long} left out, too long for the evaluator's context)" if num_too_long else ""
    run.finish(
        FIT_EVALUATOR,
        key,
        since=started,
        num_rows=len(training),
        metrics=FitEvaluatorMetrics(
            **asdict(curve),
            num_too_long=num_unfit,
            validation=validation,
        ),
        summary=f"{len(training) - num_unfit} judgements{left_out}; on {validation.num} held out: Spearman "
        + (f"{rank.mean:.2f} +- {rank.standard_error:.2f}" if rank else "undefined")
        + f", within one point {validation.within_one:.0%}",
    )
    return evaluator


def training_judgements(run: Run, judgements: Sequence[Judgements]) -> list[Judgement]:
    """Read the scored judgements; under the control "shuffled" their scores are permuted, so that they say nothing.

    Raises:
        DataError: there are too few of them.
    """
    scored = [judgement for round_judgements in judgements for judgement in round_judgements.scored()]
    if len(scored) < MIN_JUDGEMENTS:
        raise DataError(
            f"{FIT_EVALUATOR.name} needs at least {MIN_JUDGEMENTS} scored judgements, got {len(scored)}: the oracle "
            "abstained on the rest; see the query stage's table for its reasons"
        )
    if run.config.labels != "shuffled":
        return scored
    # Scores go with their rationales, so that a shuffled judgement is as consistent as a true one.
    order = np.random.default_rng(run.seed).permutation(len(scored))
    return [
        replace(judgement, score=scored[other].score, rationale=scored[other].rationale)
        for judgement, other in zip(scored, order, strict=True)
    ]


def split(judgements: list[Judgement], holdout: float, seed: int) -> tuple[list[Judgement], list[Judgement]]:
    """Split into training and held-out judgements, all judgements of one prompt on one side."""
    held_out_prompts = drawn_holdout({j.prompt_id for j in judgements}, holdout, seed)
    training = [j for j in judgements if j.prompt_id not in held_out_prompts]
    held_out = [j for j in judgements if j.prompt_id in held_out_prompts]
    return training, held_out


def _held_out_rows(
    evaluator: TrainedEvaluator,
    run: Run,
    dtype: str,
    held_out: list[Judgement],
    token_ids: Mapping[ResponseKey, list[int]],
) -> BlockTable:
    """Write the held-out judgements as rows of the training, for its evaluations.

    Raises:
        DataError: nothing can be learnt from them, and so nothing be evaluated.
    """
    try:
        rows = evaluator.training(run, dtype, held_out, token_ids).rows
    except DataError as error:
        raise DataError(
            f"evaluator.evaluate_every has nothing to evaluate on in the held-out judgements: {error}; raise "
            "evaluator.holdout, or leave evaluator.evaluate_every out"
        ) from None
    table = BlockTable(run.folder(FIT_EVALUATOR, "held_out"), 1)
    table.write(0, pa.Table.from_pylist(rows))
    return table


def _train(
    run: Run,
    services: Services,
    evaluator: TrainedEvaluator,
    training: list[Judgement],
    held_out: list[Judgement],
    token_ids: Mapping[ResponseKey, list[int]],
) -> tuple[FitMetrics, int]:
    """Train the evaluator; its curve, and the number of judgements that are too long for it."""
    prepared = evaluator.training(run, services.dtype, training, token_ids)
    job = prepared.job
    if evaluator.settings.evaluate_every is not None:
        job = replace(job, held_out=_held_out_rows(evaluator, run, services.dtype, held_out, token_ids))
    table = BlockTable(run.folder(FIT_EVALUATOR, "table"), 1)
    table.write(0, pa.Table.from_pylist(prepared.rows))
    stream = stream_of(table, run.seed)
    curve = fit_stage(run, services, FIT_EVALUATOR, prepared.loop, job, evaluator.settings, stream)
    return curve, prepared.num_too_long


def _validate(
    services: Services, evaluator: Evaluator, held_out: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]
) -> EvaluatorValidation:
    """Compare the evaluator's scores with the oracle's on held-out judgements."""
    # Through the engines that will serve it: the validation covers their numerics, too.
    items = [Scored(prompt=j.prompt, response=j.response, token_ids=token_ids[j.response_key]) for j in held_out]
    reasons: Reasons = {}
    predicted = evaluator.serve(services).score(items, reasons)
    both = [
        (score, judgement.score)
        for score, judgement in zip(predicted, held_out, strict=True)
        if score is not None and judgement.score is not None
    ]
    ours, theirs = np.array([score for score, _ in both]), np.array([score for _, score in both])
    return EvaluatorValidation(
        num=len(both),
        num_abstained=len(predicted) - len(both),
        num_too_long=len(reasons),
        loss=float(np.mean((ours - theirs) ** 2)) if both else None,
        spearman=spearman(ours, theirs),
        within_one=accuracy_within(ours, theirs) if both else 0.0,
        calibration=calibration_table(ours, theirs, num_bins=NUM_CALIBRATION_BINS) if both else [],
    )
