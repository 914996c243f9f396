"""Stage select: the responses that the oracle is asked about, picked by a strategy under the round's budget.

Strategies are pure functions (`rayrl.algorithms.selection.STRATEGIES`). This stage gives them what they read: ordinals,
or the coreset service, whose actors own the vectors. Where the budget covers everything there is, nothing is picked.
"""

import logging
import math
import time
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.exceptions import RayActorError

from rayrl.algorithms.comparisons import num_disjoint, num_pairs_asked
from rayrl.algorithms.selection import STRATEGIES, Selection, Strategy
from rayrl.config import SelectConfig
from rayrl.data.blocks import BlockTable
from rayrl.fleets.coreset import RayShards
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import SelectMetrics
from rayrl.runs.stage_table import SELECT
from rayrl.stages.artifacts import QuerySet, Responses
from rayrl.stages.selection.embedding import embed, embedding_of, seed_centers
from rayrl.stages.selection.ordinals import numbering
from rayrl.stages.selection.projection import write_projection

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A dead shard forgets its distances: the selection, which takes seconds, starts again so often."""
MAX_RADII = 200
"""Points of the covering radius that are kept for the report, about."""

QUERY_SCHEMA = pa.schema(
    [pa.field("ordinal", pa.int64(), nullable=False)]
    + [pa.field(name, pa.string(), nullable=False) for name in ("prompt_id", "response_id", "prompt", "response")]
    + [pa.field("token_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False)]
)


class QueryRow(TypedDict):
    """One chosen response, a row of the query set."""

    ordinal: int
    prompt_id: str
    response_id: str
    prompt: str
    response: str
    token_ids: list[int]


def select(run: Run, services: Services, policy: Checkpoint, responses: Responses) -> QuerySet:
    """Pick Q: the responses, or whole prompts, whose labels teach most.

    Args:
        run: the round; its budget bounds the picks.
        services: fleets; embedders, for a strategy that reads vectors.
        policy: embeds, where the policy is the embedder.
        responses: what may be picked.
    """
    config = run.config
    wording = load_rubric(config.rubric).version
    paired = config.preferences if config.asks_for_comparisons else None
    # The budget of this round and not of all: a longer run takes over what a shorter one has paid for.
    settings = config.select.science_json(exclude=frozenset({"budget"}))
    inputs = [settings, *run.content("select."), *(run.content("seed_data.") if config.select.seed_centers else [])]
    key = run.key(SELECT, *inputs, run.budget, wording, responses.key, config.labels == "expert", paired)
    query_set = QuerySet(key=key, table=BlockTable(run.folder(SELECT, "table"), 1))
    if run.finished(SELECT, key):
        return query_set
    started = time.monotonic()
    num_wanted = num_units_wanted(run, responses)
    name = config.select.strategy
    strategy = STRATEGIES[name]
    num_embedded, embed_s = None, None
    if num_wanted is None:
        selection, name = Selection(ids=list(_ordinals(run, responses)), radii=[]), "all"
    elif num_wanted == 0:
        # A later round may have nothing left to spend, after calls that were lost.
        selection, name = Selection(ids=[], radii=[]), "none"
    elif strategy.reads_vectors:
        selection, num_embedded, embed_s = _select_by_vectors(run, services, policy, responses, strategy, num_wanted)
    else:
        ids = np.fromiter(_ordinals(run, responses), np.int64)
        selection = strategy.choose(ids, min(num_wanted, len(ids)), seed=run.seed)
    rows = list(_rows_of(run, responses, selection.ids))
    query_set.table.write(0, pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))
    run.finish(
        SELECT,
        key,
        since=started,
        num_rows=len(rows),
        metrics=SelectMetrics(
            strategy=name,
            num_selected=len(rows),
            num_candidates=responses.num_responses,
            radius=[round(radius, 5) for radius in selection.radii[:: max(1, len(selection.radii) // MAX_RADII)]],
            num_embedded=num_embedded,
            embed_s=embed_s,
        ),
        summary=f"{len(rows)} of {responses.num_responses} responses by {name}",
    )
    return query_set


def num_units_wanted(run: Run, responses: Responses) -> int | None:
    """Return how many responses, or prompts, the round's budget is for; None if it takes everything there is.

    More than there are may be wanted: the strategy then gets what there is.
    """
    config = run.config
    if config.labels == "expert":
        return None
    if config.asks_for_comparisons:
        assert config.preferences is not None
        num_possible = num_possible_pairs(responses, config.preferences.pairs_per_prompt)
        num_asked = num_pairs_asked(run.budget, config.preferences.order, num_possible)
        # All prompts with two responses are asked about, unless the budget is for fewer pairs than they have.
        return math.ceil(num_asked / config.preferences.pairs_per_prompt) if num_asked < num_possible else None
    # A prompt costs the judgements of all its k responses.
    wanted = run.budget if config.select.unit == "response" else run.budget // config.generate.k
    return min(wanted, responses.num_responses)


def num_possible_pairs(responses: Responses, pairs_per_prompt: int) -> int:
    """Count the disjoint pairs of different responses that the prompts have, at most so many per prompt."""
    total = 0
    for block in responses.table.blocks():
        lengths = pc.list_value_length(block["responses"])  # type: ignore[attr-defined]
        total += sum(num_disjoint(length, pairs_per_prompt) for length in lengths.to_pylist())
    return total


def _ordinals(run: Run, responses: Responses) -> Iterator[int]:
    """Yield the ordinals of all units, block by block."""
    numbers = numbering(run.config)
    for block in range(responses.table.num_blocks):
        for row, sampled in enumerate(responses.table.read(block).column("responses").to_pylist()):
            for ordinal, _ in numbers.units(block, row, len(sampled)):
                yield ordinal


def _select_by_vectors(
    run: Run, services: Services, policy: Checkpoint, responses: Responses, strategy: Strategy, num_wanted: int
) -> tuple[Selection, int, float]:
    """Embed all units, then pick on the shards; the picks, the number of vectors, and the seconds to embed them."""
    config = run.config
    embedding = embedding_of(run, services, policy, embedder=config.select.embedder, normalize=config.select.normalize)
    started = time.monotonic()
    vectors, num_units = embed(run, embedding, responses)
    embed_s = time.monotonic() - started
    centers = seed_centers(run, embedding) if config.select.seed_centers else None
    selection = _select_on_shards(
        f"{config.name}-coreset", vectors, strategy, config.select, min(num_wanted, num_units), centers, run.seed
    )
    # In rlp every training runs beside all fleets that are up, so a fleet that only selects has to go.
    if config.pipeline == "rlp" and not config.selects_by_rewarders:
        services.retire(embedding.fleet)
    write_projection(run.folder(SELECT, "projection.parquet"), vectors, set(selection.ids))
    return selection, num_units, embed_s


def _select_on_shards(
    name: str,
    vectors: BlockTable,
    strategy: Strategy,
    config: SelectConfig,
    num_selected: int,
    centers: np.ndarray | None,
    seed: int,
) -> Selection:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        # A name of its own for each attempt: Ray may not have let go of the dead shard's yet.
        shards = RayShards(f"{name}{'-again' * (attempt - 1)}", vectors, config.num_shards)
        try:
            return strategy.choose(
                shards, num_selected, candidate_batch=config.candidate_batch, initial_centers=centers, seed=seed
            )
        except RayActorError as error:
            if attempt == MAX_ATTEMPTS:
                raise
            logger.warning("select: a shard died (%s); selecting again", error)
        finally:
            shards.stop()
    raise AssertionError("unreachable")


def _rows_of(run: Run, responses: Responses, ordinals: list[int]) -> Iterator[QueryRow]:
    """Yield the chosen responses in the order of the picks; only blocks that hold one are read."""
    numbers = numbering(run.config)
    # Blocks are read in their own order, the rows are given in that of the picks.
    wanted = set(ordinals)
    found: dict[int, list[QueryRow]] = {}
    for block in sorted({numbers.block_of(ordinal) for ordinal in ordinals}):
        for row, sampled in enumerate(responses.table.read(block).to_pylist()):
            for ordinal, index in numbers.units(block, row, len(sampled["responses"])):
                if ordinal not in wanted:
                    continue
                chosen = sampled["responses"] if index is None else [sampled["responses"][index]]
                found[ordinal] = [
                    QueryRow(
                        ordinal=ordinal,
                        prompt_id=sampled["prompt_id"],
                        response_id=response["id"],
                        prompt=sampled["prompt"],
                        response=response["text"],
                        token_ids=sampled["prompt_token_ids"] + response["token_ids"],
                    )
                    for response in chosen
                ]
    for ordinal in ordinals:
        yield from found[ordinal]
