"""Stage importance: weights of the preference pairs towards the policy, for off-policy corrected reward modelling.

A pair weighs the more, the likelier its two responses have become from M1, which wrote them, to the policy that PPO has
made (arXiv 2507.15507). Both policies are asked for log-probabilities by the generation fleet. How a weight enters the
loss is the trainer's (`rayrl.training.reward_model`).
"""

import time
from functools import partial

import pyarrow as pa
import torch
from torch import Tensor

from rayrl.algorithms.rewards import ocrm_weights
from rayrl.config import OcrmConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import ImportanceMetrics
from rayrl.runs.stage_table import IMPORTANCE
from rayrl.stages.artifacts import Preferences
from rayrl.stages.reward_model.training_data import PairWeights

SIDES = ("chosen", "rejected")
"""Columns of a table of log-probabilities."""


def importance_weights(
    run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, preferences: Preferences
) -> PairWeights:
    """Weigh every pair of D."""
    config = run.config.refresh.ocrm
    key = run.key(IMPORTANCE, config, preferences.key, m1.version, policy.version)
    table = BlockTable(run.folder(IMPORTANCE, "table"), preferences.table.num_blocks)
    weights = PairWeights(key=key, table=table)
    if run.finished(IMPORTANCE, key):
        return weights
    started = time.monotonic()
    fleet = services.ready(services.generators(m1))
    # All of D under one policy before the other: a replica holds one policy's weights, and swaps take time.
    under_m1 = _logprobs(run, preferences.table, fleet, m1)
    under_policy = _logprobs(run, preferences.table, fleet, policy)
    totals = map_blocks(
        table,
        partial(_weight_block, preferences.table, under_m1, under_policy, config),
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows, "sum": sum(block["weight"].to_pylist())},
        progress="weigh",
    )
    num_pairs = sum(total["num"] for total in totals)
    mean_weight = sum(total["sum"] for total in totals) / max(1, num_pairs)
    run.finish(
        IMPORTANCE,
        key,
        since=started,
        num_rows=num_pairs,
        metrics=ImportanceMetrics(mean_weight=mean_weight),
        summary=f"{num_pairs} pairs weighted, mean {mean_weight:.3f}",
    )
    return weights


def _logprobs(run: Run, pairs: BlockTable, fleet: Fleet, policy: Checkpoint) -> BlockTable:
    """Fill a table with log p(y | x) of both sides of every pair under a policy."""
    table = BlockTable(run.folder(IMPORTANCE, f"logprobs-{policy.version}"), pairs.num_blocks)
    map_blocks(
        table,
        partial(_logprob_block, pairs, fleet, policy),
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress="read D",
    )
    return table


def _logprob_block(pairs: BlockTable, fleet: Fleet, policy: Checkpoint, block: int) -> pa.Table:
    rows = pairs.read(block)
    prompts = rows["prompt_token_ids"].to_pylist()
    columns: dict[str, pa.Array] = {}
    for side in SIDES:
        responses = rows[f"{side}_token_ids"].to_pylist()
        logprobs = fleet.call("logprobs", policy, prompts, responses) if responses else []
        columns[side] = pa.array(logprobs, pa.float64())
    return pa.table(columns)


def _weight_block(
    pairs: BlockTable, under_m1: BlockTable, under_policy: BlockTable, config: OcrmConfig, block: int
) -> pa.Table:
    before, now, rows = under_m1.read(block), under_policy.read(block), pairs.read(block)
    chosen = _column(now, "chosen") - _column(before, "chosen")
    rejected = _column(now, "rejected") - _column(before, "rejected")
    weights = ocrm_weights(chosen, rejected, alpha=config.alpha, multiplier=config.multiplier)
    return pa.table(
        {
            "chosen_id": rows["chosen_id"],
            "rejected_id": rows["rejected_id"],
            "weight": pa.array(weights.tolist(), pa.float64()),
        }
    )


def _column(logprobs: pa.Table, side: str) -> Tensor:
    # Sums over whole sequences are large and their difference small: float32 would lose its digits.
    return torch.tensor(logprobs[side].to_pylist(), dtype=torch.float64)
