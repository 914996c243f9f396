"""Stage select: which responses the expert is asked about. k-center over embeddings, or a random draw."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayActorError

from rayrl.algorithms.selection import Selection, k_center, random_selection
from rayrl.config import SelectConfig
from rayrl.data.blocks import BlockTable
from rayrl.fleets.coreset import RayShards
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.artifacts import QuerySet, Responses
from rayrl.stages.selection.embedding import embed, embedding_of, seed_centers
from rayrl.stages.selection.ordinals import numbering
from rayrl.stages.selection.projection import write_projection

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A dead shard forgets its distances: the (seconds long) selection starts again."""


def select(run: Run, services: Services, m1: Checkpoint, responses: Responses) -> QuerySet:
    """Q: the `budget` responses whose labels teach most."""
    config = run.config.select
    everything = run.config.labels == "expert"
    key = run.key("select", config, load_rubric(run.config.rubric).version, responses.key, everything)
    query_set = QuerySet(key=key, table=BlockTable(run.folder("select", "table"), 1))
    if run.finished("select", key):
        return query_set
    started = time.monotonic()
    if everything:
        ordinals, metrics = list(_ordinals(responses, run)), {"strategy": "all"}
    elif _num_units(run, responses.num_responses) == 0:  # a later round, after calls that were lost
        ordinals, metrics = [], {"strategy": "none"}
    elif config.strategy == "random":
        ids = np.fromiter(_ordinals(responses, run), np.int64)
        ordinals = random_selection(ids, _num_units(run, len(ids)), run.config.seed)
        metrics = {"strategy": "random"}
    else:
        ordinals, metrics = _coreset(run, services, m1, responses)
    rows = list(_rows_of(run, responses, ordinals))
    query_set.table.write(0, pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))
    metrics |= {"num_selected": len(rows), "num_candidates": responses.num_responses}
    run.finish(
        "select",
        key,
        since=started,
        num_rows=len(rows),
        metrics=metrics,
        summary=f"{len(rows)} of {responses.num_responses} responses by {metrics['strategy']}",
    )
    return query_set


QUERY_SCHEMA = pa.schema(
    [pa.field("ordinal", pa.int64(), nullable=False)]
    + [pa.field(n, pa.string(), nullable=False) for n in ("prompt_id", "response_id", "prompt", "response")]
    + [pa.field("token_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False)]
)


def _num_units(run: Run, num_items: int) -> int:
    config = run.config.select
    wanted = config.budget if config.unit == "response" else config.budget // run.config.generate.k
    return min(wanted, num_items)


def _ordinals(responses: Responses, run: Run) -> Iterator[int]:
    """Ordinals of all items, block by block."""
    numbers = numbering(run.config)
    for block in range(responses.table.num_blocks):
        for row, sampled in enumerate(responses.table.read(block).column("responses").to_pylist()):
            yield from (ordinal for ordinal, _ in numbers.units(block, row, len(sampled)))


def _coreset(run: Run, services: Services, m1: Checkpoint, responses: Responses) -> tuple[list[int], dict[str, Any]]:
    config = run.config.select
    embedding = embedding_of(run, services, m1)
    started = time.monotonic()
    vectors, num_items = embed(run, embedding, responses)
    embed_s = time.monotonic() - started
    centers = seed_centers(run, embedding) if config.seed_centers else None
    selection = _select_on_shards(
        f"{run.config.name}-coreset", vectors, config, _num_units(run, num_items), centers, run.config.seed
    )
    # In rlp every training is beside all fleets that are up, and this one may have done its work.
    if run.config.pipeline == "rlp" and not run.config.selects_by_rewarders:
        services.retire(embedding.fleet)
    write_projection(run.folder("select", "projection.parquet"), vectors, set(selection.ids))
    radius = [round(r, 5) for r in selection.radii[:: max(1, len(selection.radii) // 200)]]
    metrics = {"strategy": "k_center", "radius": radius, "embed_s": embed_s, "num_embedded": num_items}
    return selection.ids, metrics


def _select_on_shards(
    name: str, vectors: BlockTable, config: SelectConfig, num: int, centers: np.ndarray | None, seed: int
) -> Selection:
    for attempt in range(MAX_ATTEMPTS):
        shards = RayShards(f"{name}{'-again' * attempt}", vectors, config.num_shards)
        try:
            return k_center(shards, num, candidate_batch=config.candidate_batch, initial_centers=centers, seed=seed)
        except RayActorError as error:
            if attempt + 1 == MAX_ATTEMPTS:
                raise
            logger.warning("select: a shard died (%s); selecting again", error)
        finally:
            shards.stop()
    raise AssertionError("unreachable")


def _rows_of(run: Run, responses: Responses, ordinals: list[int]) -> Iterator[dict[str, Any]]:
    """The chosen responses in the order of their ordinals' picks; reads only the blocks that hold one."""
    numbers = numbering(run.config)
    blocks = {numbers.block_of(ordinal) for ordinal in ordinals}
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = set(ordinals)
    for block in sorted(blocks):
        for row, sampled in enumerate(responses.table.read(block).to_pylist()):
            for ordinal, index in numbers.units(block, row, len(sampled["responses"])):
                if ordinal in wanted:
                    chosen = sampled["responses"] if index is None else [sampled["responses"][index]]
                    found[ordinal] = [
                        {
                            "ordinal": ordinal,
                            "prompt_id": sampled["prompt_id"],
                            "response_id": response["id"],
                            "prompt": sampled["prompt"],
                            "response": response["text"],
                            "token_ids": sampled["prompt_token_ids"] + response["token_ids"],
                        }
                        for response in chosen
                    ]
    for ordinal in ordinals:
        yield from found[ordinal]
