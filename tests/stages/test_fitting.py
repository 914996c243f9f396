"""What all fits share: held-out rows, and which weights were written."""

from itertools import chain

import pyarrow as pa
import pytest

from rayrl.config import PpoConfig, SftConfig
from rayrl.data.batches import optimizer_batches, share
from rayrl.data.blocks import BlockTable
from rayrl.errors import DataError
from rayrl.runs.stage_table import SFT
from rayrl.stages.fitting import HeldOut, hold_out, split, written_evaluation
from tests.runs.test_run import config_of, open_run


def write_rows(folder, num_prompts):
    """Two rows of each prompt, in blocks of ten."""
    rows = [{"prompt_id": f"p{n % num_prompts}", "n": n} for n in range(2 * num_prompts)]
    table = BlockTable(str(folder), -(-len(rows) // 10))
    for block in range(table.num_blocks):
        table.write(block, pa.Table.from_pylist(rows[10 * block : 10 * (block + 1)]))
    return table


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_rank_trains_on_a_held_out_row(tmp_path, num_ranks):
    run = open_run(config_of(tmp_path))
    table = write_rows(tmp_path / "rows", num_prompts=20)
    held_out = hold_out(run, SFT, table, SftConfig(evaluate_every=5, holdout=0.2))
    assert held_out.table is not None
    assert (len(held_out.prompts), held_out.num_rows) == (4, 8)
    evaluated = [row for block in held_out.table.blocks() for row in block.to_pylist()]
    assert {row["prompt_id"] for row in evaluated} == held_out.prompts

    stream = lambda: (split(block, held_out.prompts)[0] for block in table.blocks())  # noqa: E731
    batches = [batch for _, batch in optimizer_batches(stream, epochs=1, batch_size=5, seed=0)]
    ranks = [list(chain(*(share(batch, rank, num_ranks) for batch in batches))) for rank in range(num_ranks)]
    trained = list(chain(*ranks))
    assert not held_out.prompts & {row["prompt_id"] for row in trained}
    assert sorted(row["n"] for row in trained + evaluated) == list(range(40))


def test_rows_are_held_out_only_for_evaluations_and_from_two_prompts_on(tmp_path):
    run = open_run(config_of(tmp_path))
    table = write_rows(tmp_path / "rows", num_prompts=1)
    assert hold_out(run, SFT, table, SftConfig()) == HeldOut()
    with pytest.raises(DataError, match=r"sft.evaluate_every needs rows of at least 2 prompts, .* got 1; give more"):
        hold_out(run, SFT, table, SftConfig(evaluate_every=5))


def test_the_written_weights_are_the_best_with_patience_and_else_the_last():
    losses = [None, 2.0, 1.0, None, 1.0, 3.0]
    curve = [{"step": step, "loss": 1.0, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    found = [written_evaluation(curve, SftConfig(evaluate_every=1, patience=patience)) for patience in (None, 3)]
    assert [row and row["step"] for row in found] == [6, 3]
    assert written_evaluation([{"step": 1, "loss": 1.0}], PpoConfig()) is None
