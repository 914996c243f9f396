"""What the selection sees of an item: a vector of the policy, or of a sentence-embedding model."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.config import PolicyConfig, SelectConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length, encode_prompt, load_tokenizer
from rayrl.errors import DataError
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import Rubric, fill, load_rubric
from rayrl.records import Checkpoint, content_id
from rayrl.runs.run import Run
from rayrl.runs.storage import local_folder
from rayrl.stages.artifacts import Responses
from rayrl.stages.selection.candidates import seed_responses
from rayrl.stages.selection.ordinals import Numbering, numbering


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How items become vectors; travels to the tasks that embed blocks."""

    fleet: Fleet
    checkpoint: Checkpoint
    policy: PolicyConfig
    select: SelectConfig
    rubric: Rubric
    numbering: Numbering
    max_tokens: int

    @property
    def reads_text(self) -> bool:
        """Whether the selection needs a tokenizer; else all it sees is tokens already."""
        return self.select.embedder != "policy" or self.select.text == "judge_prompt"

    def tokenizer(self) -> Any:
        """The embedder's; a sentence-embedding model's need not know an end of sequence."""
        from transformers import AutoTokenizer

        if self.select.embedder == "policy":
            return load_tokenizer(self.policy)
        return AutoTokenizer.from_pretrained(local_folder(self.checkpoint.path))

    def vectors(self, inputs: list[list[int]]) -> np.ndarray:
        """One row per input."""
        if not inputs:
            return np.empty((0, 1), np.float32)
        cut = [tokens[: self.max_tokens] for tokens in inputs]
        vectors = self.fleet.call("embed", self.checkpoint, cut)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.select.normalize else vectors


def embedding_of(run: Run, services: Services, m1: Checkpoint) -> Embedding:
    """The embedder the config asks for, its fleet started."""
    config = run.config
    if config.select.embedder == "policy":
        checkpoint, fleet = m1, services.embedders(m1, config.select.pooling)
        embedder = config.policy.model_copy(update={"path": m1.path, "revision": None})
    else:
        path = config.select.embedder
        checkpoint = Checkpoint(path=path, version=content_id("embedder", path))
        fleet = services.sentence_embedders(checkpoint, config.select.pooling)
        embedder = PolicyConfig(path=path)
    return Embedding(
        fleet=services.ready(fleet),
        checkpoint=checkpoint,
        policy=config.policy,
        select=config.select,
        rubric=load_rubric(config.rubric),
        numbering=numbering(config),
        max_tokens=context_length(embedder),
    )


def embed(run: Run, embedding: Embedding, responses: Responses) -> tuple[BlockTable, int]:
    """Vectors of every item, memoised by block, and how many there are."""
    vectors = BlockTable(run.folder("select", f"embeddings-{embedding.checkpoint.version}"), responses.table.num_blocks)
    counts = map_blocks(
        vectors,
        partial(embed_block, embedding, responses.table),
        concurrency=embedding.fleet.concurrency,
        describe=lambda block: {"num": block.num_rows},
        progress="embed",
    )
    return vectors, sum(count["num"] for count in counts)


def embed_block(embedding: Embedding, responses: BlockTable, block: int) -> pa.Table:
    """Vectors of one block's items: `ordinal`, `vector`."""
    tokenizer = embedding.tokenizer() if embedding.reads_text else None
    ordinals, inputs = [], []
    for row, sampled in enumerate(responses.read(block).to_pylist()):
        for ordinal, index in embedding.numbering.units(block, row, len(sampled["responses"])):
            ordinals.append(ordinal)
            inputs.append(_input(embedding, tokenizer, sampled, index))
    vectors = embedding.vectors(inputs)
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    nested = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table({"ordinal": pa.array(ordinals, pa.int64()), "vector": nested})


def seed_centers(run: Run, embedding: Embedding) -> np.ndarray:
    """Vectors of the seed data: what is labelled already."""
    if run.config.seed_data is None:
        raise DataError("select.seed_centers needs seed data: add a [seed_data] table or set it to false")
    tokenizer = embedding.tokenizer() if embedding.reads_text else None
    rows = [asdict(row) for row in seed_responses(run)]
    return embedding.vectors(
        [_input(embedding, tokenizer, row, i) for row in rows for i in range(len(row["responses"]))]
    )


def _input(embedding: Embedding, tokenizer: Any, sampled: dict[str, Any], index: int | None) -> list[int]:
    """Tokens of what is embedded. With unit "prompt" and a text that holds a response, the first one stands for all."""
    text, own = embedding.select.text, embedding.select.embedder == "policy"
    response = sampled["responses"][index or 0]
    if text == "judge_prompt":
        judged = fill(embedding.rubric, sampled["prompt"], response["text"])
        return encode_prompt(tokenizer, judged, "plain") if own else tokenizer.encode(judged)
    if own:
        return sampled["prompt_token_ids"] + (response["token_ids"] if text == "prompt_response" else [])
    return tokenizer.encode(sampled["prompt"] + (f"\n{response['text']}" if text == "prompt_response" else ""))
