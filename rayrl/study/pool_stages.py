"""Sampling and embedding of a study's pool, by the stages of its base config."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator

import pyarrow as pa

from rayrl.config import RunConfig
from rayrl.config.oracle import OracleTable
from rayrl.data.blocks import BlockTable
from rayrl.fleets.coreset import vectors_of
from rayrl.pipelines.run_pipeline import Running, running
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.stages.artifacts import Responses
from rayrl.stages.policy.sft import sft
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.candidates import responses_of_seed_data
from rayrl.stages.selection.embedding import embed, embedding_of
from rayrl.stages.selection.ordinals import numbering
from rayrl.study.comparisons_table import seed_tables
from rayrl.study.pool import SCHEMA, STRIDE


def make_pool(config: RunConfig, compared: OracleTable | None, stopping: Stopping | None) -> pa.Table:
    """Run the stages up to the vectors in the run's folder; return the table of the pool.

    Args:
        config: the run.
        compared: a table of comparisons, whose responses are the pool.
        stopping: this process's handlers of signals.
    """
    with running(config, check(config), stopping=stopping) as now:
        responses = pool_responses(now, compared)
        m1 = sft(now.run, now.services)
        embedding = embedding_of(
            now.run, now.services, m1, embedder=config.select.embedder, normalize=config.select.normalize
        )
        vectors, _ = embed(now.run, embedding, responses)
        return pa.Table.from_batches(_rows(config, responses, vectors), schema=SCHEMA)


def pool_responses(now: Running, compared: OracleTable | None = None) -> Responses:
    """Return the policy's responses, or those of the seed data or of a table of comparisons."""
    if compared is not None:
        return responses_of_seed_data(now.run, seed_tables(now.run.config, compared))
    if now.run.config.generate.source == "seed":
        return responses_of_seed_data(now.run)
    pool = read_pool(now.run)
    m1 = sft(now.run, now.services)
    now.services.warm(m1)
    return generate(now.run, now.services, m1, pool)


def _rows(config: RunConfig, responses: Responses, vectors: BlockTable) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the pool, block by block."""
    numbers = numbering(config)
    for block in range(responses.table.num_blocks):
        rows = responses.table.read(block).to_pylist()
        embedded = vectors.read(block)
        if embedded.num_rows == 0:
            continue
        ordinals, matrix = vectors_of(embedded)
        vector_of = dict(zip(ordinals.tolist(), matrix, strict=True))
        found: list[dict[str, object]] = []
        for place, row in enumerate(rows):
            for ordinal, index in numbers.units(block, place, len(row["responses"])):
                assert index is not None, "a study asks about single responses"
                response = row["responses"][index]
                found.append(
                    {
                        "id": ordinal // numbers.per_prompt * STRIDE + index,
                        "prompt_id": row["prompt_id"],
                        "response_id": response["id"],
                        "prompt": row["prompt"],
                        "response": response["text"],
                        "vector": vector_of[ordinal],
                    }
                )
        yield from pa.Table.from_pylist(found, schema=SCHEMA).to_batches()
