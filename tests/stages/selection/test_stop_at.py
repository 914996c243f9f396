"""Stopping between batches: the label meter is logged after each, and ends the asking at `select.stop_at`."""

import numpy as np
import pytest

from rayrl.algorithms.acquisition import Answers
from rayrl.algorithms.selection import CoresetShard, LocalShards
from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.records import Response, Sampled, to_table
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Responses
from rayrl.stages.selection.select import _choose, _ordinals, acquisition_of

NUM_BLOCKS, BLOCK_SIZE = 4, 16


@pytest.fixture
def responses(tmp_path):
    """Two responses to each of 64 prompts."""
    table = BlockTable(str(tmp_path / "y"), NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        rows = []
        for prompt in (f"p{block}-{row}" for row in range(BLOCK_SIZE)):
            answers = [
                Response(
                    id=f"{prompt}-{k}",
                    text=f"{prompt} {k}",
                    token_ids=[k],
                    seed=0,
                    policy_version="m",
                    logprob=-1.0,
                    finish_reason="stop",
                )
                for k in range(2)
            ]
            rows.append(Sampled(prompt_id=prompt, prompt="q", prompt_token_ids=[1], responses=answers))
        table.write(block, to_table(rows, Sampled))
    return Responses(key="r", table=table, num_prompts=64, num_responses=128)


@pytest.mark.parametrize(("stop_at", "num_asked"), [(None, 100), (0.5, 40)])
def test_labels_that_are_surely_enough_end_the_asking(tmp_path, responses, caplog, stop_at, num_asked):
    select = {"budget": 100, "strategy": "uncertainty", "first_batch": "k_center", "batches": 5, "stop_at": stop_at}
    config = RunConfig.model_validate(
        {
            "name": "small",
            "run_dir": str(tmp_path),
            "policy": {"path": "m"},
            "pool": {"path": "p.jsonl"},
            "seed_data": {"path": "s.jsonl"},
            "generate": {"k": 2, "block_size": BLOCK_SIZE},
            "select": select,
            "oracle": {"type": "scripted", "function": "a:b"},
        }
    )
    run = Run(config=config, url=str(tmp_path))
    ids = np.fromiter(_ordinals(run, responses), np.int64)
    vectors = np.random.default_rng(0).standard_normal((len(ids), 6)).astype(np.float32)
    scores = dict(zip(ids.tolist(), vectors[:, 0].tolist(), strict=True))  # soon learnt

    def ask(rows):
        return Answers(scores=[scores[row["ordinal"]] for row in rows], num_spent=len(rows))

    with caplog.at_level("INFO", logger="rayrl.stages.selection.select"):
        shards = LocalShards([CoresetShard(ids, vectors)])
        chosen = _choose(run, "key", responses, ids, shards, 100, acquisition_of(run), ask)
    assert len(chosen.selection.ids) == num_asked
    assert (chosen.num_unspent, chosen.is_enough) == (100 - num_asked, stop_at is not None)
    lines = [record.message for record in caplog.records if record.message.startswith("select: meter: ")]
    assert len(lines) == num_asked // 20
    assert "20 judgements; not known yet: a curve takes 32 judgements" in lines[0]
    assert lines[1].startswith("select: meter: 40 judgements, agreement 0.9")
    # A run that goes on after its last batch finds that it was enough.
    again = _choose(run, "key", responses, ids, shards, 100, acquisition_of(run), lambda rows: pytest.fail("asked"))
    assert again == chosen
