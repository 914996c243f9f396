"""Importance weights of the preference pairs towards the policy: off-policy corrected reward modelling (2507.15507)."""

import time
from functools import partial

import pyarrow as pa
import torch

from rayrl.algorithms.rewards import ocrm_weights
from rayrl.config import OcrmConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Preferences
from rayrl.stages.reward_model.training_data import PairWeights

STAGE = "importance"
SIDES = ("chosen", "rejected")


def importance_weights(
    run: Run, services: Services, m1: Checkpoint, policy: Checkpoint, preferences: Preferences
) -> PairWeights:
    """The weight of every pair of D: how much likelier its responses have become from M1 to the policy."""
    config = run.config.refresh.ocrm
    key = run.key(STAGE, config, preferences.key, m1.version, policy.version)
    weights = PairWeights(key=key, table=BlockTable(run.folder(STAGE, "table"), preferences.table.num_blocks))
    if run.finished(STAGE, key):
        return weights
    started = time.monotonic()
    fleet = services.ready(services.generators(m1))
    under_m1, under_policy = (_logprobs(run, preferences.table, fleet, of) for of in (m1, policy))
    totals = map_blocks(
        weights.table,
        partial(_weigh, preferences.table, under_m1, under_policy, config),
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows, "sum": sum(block["weight"].to_pylist())},
        progress="weigh",
    )
    num, total = sum(t["num"] for t in totals), sum(t["sum"] for t in totals)
    run.finish(
        STAGE,
        key,
        since=started,
        num_rows=num,
        metrics={"mean_weight": total / max(1, num)},
        summary=f"{num} pairs weighted, mean {total / max(1, num):.3f}",
    )
    return weights


def _logprobs(run: Run, pairs: BlockTable, fleet: Fleet, policy: Checkpoint) -> BlockTable:
    """Log p(y | x) of both sides of every pair: all of D under one policy before the next one's weights come."""
    table = BlockTable(run.folder(STAGE, f"logprobs-{policy.version}"), pairs.num_blocks)
    map_blocks(
        table,
        partial(_read, pairs, fleet, policy),
        concurrency=fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress="read D",
    )
    return table


def _read(pairs: BlockTable, fleet: Fleet, policy: Checkpoint, block: int) -> pa.Table:
    rows = pairs.read(block).to_pylist()
    prompts = [row["prompt_token_ids"] for row in rows]
    columns = {
        side: fleet.call("logprobs", policy, prompts, [row[f"{side}_token_ids"] for row in rows]) if rows else []
        for side in SIDES
    }
    return pa.table({side: pa.array(values, pa.float64()) for side, values in columns.items()})


def _weigh(
    pairs: BlockTable, under_m1: BlockTable, under_policy: BlockTable, config: OcrmConfig, block: int
) -> pa.Table:
    before, now, rows = under_m1.read(block), under_policy.read(block), pairs.read(block)
    chosen, rejected = (
        torch.tensor(now[side].to_pylist(), dtype=torch.float64)
        - torch.tensor(before[side].to_pylist(), dtype=torch.float64)
        for side in SIDES
    )
    weights = ocrm_weights(chosen, rejected, alpha=config.alpha, multiplier=config.multiplier)
    return pa.table(
        {
            "chosen_id": rows["chosen_id"],
            "rejected_id": rows["rejected_id"],
            "weight": pa.array(weights.tolist(), pa.float64()),
        }
    )
