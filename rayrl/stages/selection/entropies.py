"""Entropies of the evaluator's score distributions, for the selection of the round after the one that fitted it.

A round's responses are new, so that the pseudo-labels of the round before, which the same evaluator made, are not of
them: they take one more read of each, as many as the candidates. The entropies of a block are kept, so that a repeated
selection reads nothing twice.
"""

from functools import partial

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.records import Scored
from rayrl.runs.run import Run
from rayrl.runs.stage_table import ENTROPIES, SELECT
from rayrl.stages.artifacts import Responses
from rayrl.stages.rewards.evaluator import Evaluator, GenerativeScorer

SCHEMA = pa.schema([pa.field("entropy", pa.float64())])
"""A row for each response of a block, in their order; null where the evaluator abstained."""


def score_entropies(
    run: Run, services: Services, evaluator: Evaluator, responses: Responses
) -> Float64[np.ndarray, " n"]:
    """Read the entropy of each response's score, in nats, in the order of the ordinals; NaN where there is none."""
    scorer = evaluator.serve(services)
    assert isinstance(scorer, GenerativeScorer), "other evaluators are refused"
    name = run.key(SELECT, "entropies", responses.key, evaluator.key)
    table = BlockTable(run.folder(SELECT, f"{ENTROPIES}{name}"), responses.table.num_blocks)
    map_blocks(
        table,
        partial(entropy_block, scorer, responses.table),
        concurrency=scorer.concurrency,
        describe=lambda block: {"num_read": block.num_rows},
        progress="entropies",
    )
    return np.concatenate([block["entropy"].to_numpy() for block in table.blocks()])


def entropy_block(scorer: GenerativeScorer, responses: BlockTable, block: int) -> pa.Table:
    """Read the entropies of one block."""
    items = [
        Scored(
            prompt=row["prompt"], response=response["text"], token_ids=row["prompt_token_ids"] + response["token_ids"]
        )
        for row in responses.read(block).to_pylist()
        for response in row["responses"]
    ]
    return pa.table({"entropy": scorer.entropies(items)}, schema=SCHEMA)
