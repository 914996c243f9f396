"""Stage select: which responses the expert is asked about. k-center over embeddings, or a random draw."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayActorError

from rayrl.actors.coreset import RayShards
from rayrl.actors.fleet import Fleet
from rayrl.actors.services import Services
from rayrl.algorithms.selection import Selection, k_center, random_selection
from rayrl.config import SelectConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import encode_prompt, load_tokenizer
from rayrl.errors import DataError
from rayrl.models.judge import Rubric, fill, load_rubric
from rayrl.records import Checkpoint, content_id
from rayrl.runs.run import Run
from rayrl.runs.storage import local_folder
from rayrl.stages.generate import Responses
from rayrl.stages.projection import write_projection

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A dead shard forgets its distances: the (seconds long) selection starts again."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How items become vectors; travels to the tasks that embed blocks."""

    responses: BlockTable
    fleet: Fleet
    checkpoint: Checkpoint
    config: SelectConfig
    rubric: Rubric
    policy: Any
    own_tokenizer: bool
    """The embedder is the policy itself: it reads the very tokens the policy wrote."""
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """The query set Q: a one-part table of the chosen responses, in the order they were picked."""

    key: str
    table: BlockTable


def select(run: Run, services: Services, m1: Checkpoint, responses: Responses) -> QuerySet:
    """Q: the `budget` responses whose labels teach most."""
    config = run.config.select
    everything = run.config.labels == "expert"
    key = run.key("select", config, run.config.rubric, responses.key, everything)
    query_set = QuerySet(key=key, table=BlockTable(run.folder("select", "table"), 1))
    if run.finished("select", key):
        return query_set
    started = time.monotonic()
    if everything:
        ordinals, metrics = list(_ordinals(responses, run)), {"strategy": "all"}
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


def stride(run: Run) -> int:
    """Ordinals set aside per block: room for every response the block could hold."""
    return run.config.generate.block_size * max(run.config.generate.k, 64)


def _ordinals(responses: Responses, run: Run) -> Iterator[int]:
    """Ordinals of all items, block by block."""
    for block in range(responses.table.num_blocks):
        for row, sampled in enumerate(responses.table.read(block).column("responses").to_pylist()):
            yield from (ordinal for ordinal, _ in _units(run, block, row, len(sampled)))


def _units(run: Run, block: int, row: int, num_responses: int) -> Iterator[tuple[int, int | None]]:
    first = block * stride(run) + row * max(run.config.generate.k, 64)
    if run.config.select.unit == "prompt":
        yield from [(first, None)] if num_responses else []
    else:
        yield from ((first + i, i) for i in range(num_responses))


def _coreset(run: Run, services: Services, m1: Checkpoint, responses: Responses) -> tuple[list[int], dict[str, Any]]:
    config = run.config.select
    embedding = _embedding(run, services, m1, responses)
    vectors = BlockTable(run.folder("select", f"embeddings-{embedding.checkpoint.version}"), responses.table.num_blocks)
    services.ready(embedding.fleet)
    embed_s = time.monotonic()
    counts = map_blocks(
        vectors,
        partial(embed_block, embedding, run),
        concurrency=embedding.fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress="embed",
    )
    embed_s = time.monotonic() - embed_s
    num_items = sum(count["num"] for count in counts)
    centers = _seed_centers(run, embedding) if config.seed_centers else None
    selection = _select_on_shards(vectors, config, _num_units(run, num_items), centers, run.config.seed)
    write_projection(run.folder("select", "projection.parquet"), vectors, set(selection.ids))
    radius = [round(r, 5) for r in selection.radii[:: max(1, len(selection.radii) // 200)]]
    metrics = {"strategy": "k_center", "radius": radius, "embed_s": embed_s, "num_embedded": num_items}
    return selection.ids, metrics


def _select_on_shards(
    vectors: BlockTable, config: SelectConfig, num: int, centers: np.ndarray | None, seed: int
) -> Selection:
    for attempt in range(MAX_ATTEMPTS):
        shards = RayShards(vectors, config.num_shards)
        try:
            return k_center(shards, num, candidate_batch=config.candidate_batch, initial_centers=centers, seed=seed)
        except RayActorError as error:
            if attempt + 1 == MAX_ATTEMPTS:
                raise
            logger.warning("select: a shard died (%s); selecting again", error)
        finally:
            shards.stop()
    raise AssertionError("unreachable")


def _embedding(run: Run, services: Services, m1: Checkpoint, responses: Responses) -> Embedding:
    config = run.config
    own = config.select.embedder == "policy"
    path = config.select.embedder
    checkpoint = m1 if own else Checkpoint(path=path, version=content_id("embedder", path))
    policy = config.policy if own else config.policy.model_copy(update={"path": path, "prompt_format": "plain"})
    embedders = services.embedders if own else services.sentence_embedders
    return Embedding(
        responses=responses.table,
        fleet=embedders(checkpoint, config.select.pooling),
        checkpoint=checkpoint,
        config=config.select,
        rubric=load_rubric(config.rubric),
        policy=policy,
        own_tokenizer=own,
        max_tokens=_context(local_folder(path if not own else m1.path), config.policy.max_model_len),
    )


def _context(path: str, max_model_len: int | None) -> int:
    from transformers import AutoConfig

    context = AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings
    return min(context, max_model_len or context)


def embed_block(embedding: Embedding, run: Run, block: int) -> pa.Table:
    """Vectors of one block's items: `ordinal`, `vector`."""
    tokenizer = load_tokenizer(embedding.policy)
    ordinals, inputs = [], []
    for row, sampled in enumerate(embedding.responses.read(block).to_pylist()):
        for ordinal, index in _units(run, block, row, len(sampled["responses"])):
            ordinals.append(ordinal)
            inputs.append(_input(embedding, tokenizer, sampled, index)[: embedding.max_tokens])
    vectors = embedding.fleet.call("embed", embedding.checkpoint, inputs) if inputs else np.empty((0, 1), np.float32)
    if embedding.config.normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    nested = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table({"ordinal": pa.array(ordinals, pa.int64()), "vector": nested})


def _input(embedding: Embedding, tokenizer: Any, sampled: dict[str, Any], index: int | None) -> list[int]:
    """Tokens of what is embedded. With unit "prompt" and a text that holds a response, the first one stands for all."""
    text = embedding.config.text
    response = sampled["responses"][index or 0]
    if text == "judge_prompt":
        return encode_prompt(tokenizer, fill(embedding.rubric, sampled["prompt"], response["text"]), "plain")
    if embedding.own_tokenizer:
        return sampled["prompt_token_ids"] + (response["token_ids"] if text == "prompt_response" else [])
    joined = sampled["prompt"] + (f"\n{response['text']}" if text == "prompt_response" else "")
    return tokenizer.encode(joined)


def _seed_centers(run: Run, embedding: Embedding) -> np.ndarray:
    """Vectors of the seed data: what is labelled already."""
    from rayrl.data.reading import read_seed_rows
    from rayrl.data.tokenizing import render

    if run.config.seed_data is None:
        raise DataError("select.seed_centers needs seed data: add a [seed_data] table or set it to false")
    tokenizer = load_tokenizer(embedding.policy)
    renderer = partial(render, tokenizer, embedding.policy.prompt_format)
    inputs = []
    for prompt, text in read_seed_rows(run.config.seed_data, renderer):
        sampled = {
            "prompt": prompt.text,
            "prompt_token_ids": encode_prompt(tokenizer, prompt.rendered, embedding.policy.prompt_format),
            "responses": [{"text": text, "token_ids": tokenizer.encode(text, add_special_tokens=False)}],
        }
        inputs.append(_input(embedding, tokenizer, sampled, 0)[: embedding.max_tokens])
    vectors = embedding.fleet.call("embed", embedding.checkpoint, inputs)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if embedding.config.normalize else vectors


def _rows_of(run: Run, responses: Responses, ordinals: list[int]) -> Iterator[dict[str, Any]]:
    """The chosen responses in the order of their ordinals' picks; reads only the blocks that hold one."""
    blocks = {ordinal // stride(run) for ordinal in ordinals}
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = set(ordinals)
    for block in sorted(blocks):
        for row, sampled in enumerate(responses.table.read(block).to_pylist()):
            for ordinal, index in _units(run, block, row, len(sampled["responses"])):
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
