"""Stage dpo: M1 -> M2 on the preference pairs; in a later round M_t -> M_{t+1}, with M_t as the reference."""

import time

import numpy as np

from rayrl.algorithms.scaling import CALLS_PER_REPLICA
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.records import Checkpoint
from rayrl.runs import storage
from rayrl.runs.run import Run
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.stages.proxy.pseudo_label import Pairs, finish_pairs
from rayrl.training.dpo import DpoJob, train_dpo


def dpo(run: Run, services: Services, m1: Checkpoint, pairs: Pairs) -> Checkpoint:
    """M2: DPO from M1; pairs are scored and made while the first epoch reads them, unless they are there already.

    `m1` is where the training starts and what it is kept close to. Rounds are iterative DPO: each starts from the
    policy that wrote its pairs, and refers to it.
    """
    config = run.config
    key = run.key("dpo", config.dpo, pairs.key, m1.version)
    checkpoint = Checkpoint(path=run.folder("dpo", "checkpoint"), version=f"dpo-{key}")
    if run.finished("dpo", key):
        finish_pairs(run, pairs)
        return checkpoint
    if pairs.num_done == 0:
        raise DataError(
            "dpo has no pair to train on: every prompt is a tie, or too few responses are scored; lower "
            "pseudo_label.min_margin or raise select.budget"
        )
    started = time.monotonic()
    job = DpoJob(
        run_url=run.url,
        checkpoint_url=checkpoint.path,
        policy=config.policy.model_copy(update={"path": m1.path, "revision": None}),
        dpo=config.dpo,
        reference=services.reference,
        dtype=services.dtype,
        seed=config.seed,
        num_rows=pairs.num_done or pairs.num_planned,
    )
    concurrency = CALLS_PER_REPLICA * config.generators.most
    stream = stream_of(pairs.table, config.seed, pairs.labelling.pair_block, concurrency=concurrency)
    metrics = fit_stage(run, services, "dpo", train_dpo, job, config.dpo, stream)
    pairs = finish_pairs(run, pairs)
    curve = read_metrics(storage.join(run.url, "metrics", "dpo.jsonl"))
    tokens = sum(row["num_tokens"] for row in curve)
    metrics |= {
        "tokens_per_s": tokens / max(1e-9, sum(row["seconds"] for row in curve)),
        "padding_share": float(np.mean([row["padding_share"] for row in curve])),
        "reward_accuracy": float(np.mean([row["reward_accuracy"] for row in curve[-10:]])),
    }
    run.finish(
        "dpo",
        key,
        since=started,
        num_rows=pairs.num_done or 0,
        metrics=metrics,
        summary=f"{metrics['num_steps']} steps, loss {metrics['first_loss']:.3f} -> {metrics['final_loss']:.3f}, "
        f"reward accuracy {metrics['reward_accuracy']:.2f}",
    )
    return checkpoint
