"""Stage dpo: M1 -> M2 on the preference pairs; in a later round M_t -> M_{t+1}, with M_t as the reference."""

import time
from dataclasses import asdict

import numpy as np

from rayrl.algorithms.scaling import CALLS_PER_REPLICA
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import DpoMetrics, FitMetrics
from rayrl.runs.stage_table import DPO
from rayrl.stages.fitting import LAST_STEPS, HeldOut, fit_stage, hold_out, losses_of, stream_of
from rayrl.stages.proxy.pseudo_label import Pairs, finish_pairs
from rayrl.training.dpo import DpoJob, train_dpo


def dpo(run: Run, services: Services, policy: Checkpoint, pairs: Pairs) -> Checkpoint:
    """Make M2: DPO from M1. Pairs are scored and made while the first epoch reads them, unless they are made already.

    Rounds are iterative DPO: each starts from the policy that wrote its pairs, and that policy is its reference.

    Args:
        run: the run.
        services: fleets; the evaluator's scores the pairs that are not made yet.
        policy: M1, and in a later round the last policy: start and reference of the training.
        pairs: P.

    Raises:
        DataError: there is no pair.
    """
    config = run.config
    key = run.key(DPO, config.dpo, pairs.key, policy.version)
    checkpoint = Checkpoint(path=run.folder(DPO, "checkpoint"), version=f"dpo-{key}")
    if run.finished(DPO, key):
        # A process that died right after the training may have left the pairs without their manifest.
        finish_pairs(run, pairs)
        return checkpoint
    if pairs.num_done == 0:
        raise DataError(
            f"{DPO.name} has no pair to train on: every prompt is a tie, or too few responses are scored; lower "
            "pseudo_label.min_margin or raise select.budget"
        )
    started = time.monotonic()
    held_out = HeldOut()
    if config.dpo.evaluate_every is not None:
        pairs = finish_pairs(run, pairs)  # nothing can be held out of pairs that are not made
        held_out = hold_out(run, DPO, pairs.table, config.dpo)
    job = DpoJob(
        stage=DPO.name,
        run_url=run.url,
        checkpoint_url=checkpoint.path,
        policy=config.policy,
        start=policy,
        dpo=config.dpo,
        reference=services.reference,
        dtype=services.dtype,
        seed=run.seed,
        num_rows=(pairs.num_done or pairs.num_planned) - held_out.num_rows,
        held_out=held_out.table,
    )
    concurrency = CALLS_PER_REPLICA * config.generators.most
    stream = stream_of(
        pairs.table, run.seed, pairs.blocks.pair_block, concurrency=concurrency, without=held_out.prompts
    )
    fitted = fit_stage(run, services, DPO, train_dpo, job, config.dpo, stream)
    pairs = finish_pairs(run, pairs)
    metrics = _metrics(run, fitted)
    run.finish(
        DPO,
        key,
        since=started,
        num_rows=pairs.num_done or 0,
        metrics=metrics,
        summary=f"{metrics.num_steps} steps, {losses_of(metrics)}, reward accuracy {metrics.reward_accuracy:.2f}",
    )
    return checkpoint


def _metrics(run: Run, fitted: FitMetrics) -> DpoMetrics:
    curve = read_metrics(run.curve(DPO))
    num_tokens = sum(row["num_tokens"] for row in curve)
    seconds = sum(row["seconds"] for row in curve)
    return DpoMetrics(
        **asdict(fitted),
        tokens_per_s=num_tokens / max(1e-9, seconds),
        padding_share=float(np.mean([row["padding_share"] for row in curve])),
        reward_accuracy=float(np.mean([row["reward_accuracy"] for row in curve[-LAST_STEPS:]])),
    )
