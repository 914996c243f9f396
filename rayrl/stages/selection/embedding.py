"""Vectors of responses and prompts: hidden states of the policy, or the output of a sentence-embedding model.

Selection reads them, and so does the clustering of synthetic preference generation. Vectors of a block are kept, so
that a repeated selection embeds nothing twice.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayrl.config import PolicyConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length, embedding_context_length, encode_prompt, encode_text, load_tokenizer
from rayrl.errors import DataError
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import Rubric, fill, load_rubric
from rayrl.records import Checkpoint, Sampled, content_id, from_row
from rayrl.runs.run import Run
from rayrl.runs.stage_table import EMBEDDINGS, SELECT
from rayrl.runs.storage import local_folder
from rayrl.stages.artifacts import Responses
from rayrl.stages.selection.candidates import seed_responses
from rayrl.stages.selection.ordinals import Numbering, numbering


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The model and the text that make a vector of an item. Travels to the tasks that embed blocks."""

    fleet: Fleet
    checkpoint: Checkpoint
    uses_policy: bool
    """Whether the policy embeds; it reads token ids, a sentence-embedding model reads text."""
    policy: PolicyConfig
    text: Literal["prompt", "prompt_response", "judge_prompt"]
    normalize: bool
    rubric: Rubric
    numbering: Numbering
    max_tokens: int
    """Longer inputs lose their ends."""

    @property
    def needs_tokenizer(self) -> bool:
        """Return whether items are tokenised here; otherwise the token ids of the responses table are embedded."""
        return not self.uses_policy or self.text == "judge_prompt"

    def tokenizer(self) -> Any:
        """Load the embedder's tokenizer. A sentence-embedding model's need not have an end-of-sequence token."""
        if self.uses_policy:
            return load_tokenizer(self.policy)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(local_folder(self.checkpoint.path))

    def vectors(self, inputs: list[list[int]]) -> np.ndarray:
        """Embed token ids: (num_inputs, width) float32, of length 1 each if `normalize`."""
        if not inputs:
            return np.empty((0, 1), np.float32)
        cut = [tokens[: self.max_tokens] for tokens in inputs]
        vectors: np.ndarray = self.fleet.call("embed", self.checkpoint, cut)
        if not self.normalize:
            return vectors
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embedding_of(run: Run, services: Services, m1: Checkpoint, *, embedder: str, normalize: bool) -> Embedding:
    """Start the fleet of an embedder: "policy" (which then has M1's weights), or a sentence-embedding model."""
    config = run.config
    pooling = config.select.pooling
    uses_policy = embedder == "policy"
    if uses_policy:
        checkpoint, max_tokens = m1, context_length(config.policy)
        fleet = services.embedders(m1, pooling)
    else:
        setting = "select.embedder" if embedder == config.select.embedder else "refresh.spg.embedder"
        checkpoint = Checkpoint(path=embedder, version=content_id("embedder", embedder, *run.content(setting)))
        max_tokens = embedding_context_length(embedder)
        fleet = services.sentence_embedders(checkpoint, pooling)
    return Embedding(
        fleet=services.ready(fleet),
        checkpoint=checkpoint,
        uses_policy=uses_policy,
        policy=config.policy,
        text=config.select.text,
        normalize=normalize,
        rubric=load_rubric(config.rubric),
        numbering=numbering(config),
        max_tokens=max_tokens,
    )


def embed(run: Run, embedding: Embedding, responses: Responses) -> tuple[BlockTable, int]:
    """Embed every unit of a responses table, block by block; the table of vectors, and how many there are."""
    # Named by all that decides the vectors, and by nothing else: another budget or strategy reads them again.
    settings = [embedding.text, run.config.select.pooling, str(embedding.normalize), embedding.numbering.unit]
    name = run.key(SELECT, settings, embedding.rubric.version, responses.key, embedding.checkpoint.version)
    vectors = BlockTable(run.folder(SELECT, f"{EMBEDDINGS}{name}"), responses.table.num_blocks)
    counts = map_blocks(
        vectors,
        partial(embed_block, embedding, responses.table),
        concurrency=embedding.fleet.concurrency,
        describe=lambda block: {"num_vectors": block.num_rows},
        progress="embed",
    )
    return vectors, sum(block["num_vectors"] for block in counts)


def embed_block(embedding: Embedding, responses: BlockTable, block: int) -> pa.Table:
    """Embed one block's units: columns `ordinal` and `vector`."""
    tokenizer = embedding.tokenizer() if embedding.needs_tokenizer else None
    ordinals: list[int] = []
    inputs: list[list[int]] = []
    for row_number, row in enumerate(responses.read(block).to_pylist()):
        sampled = from_row(row, Sampled)
        for ordinal, index in embedding.numbering.units(block, row_number, len(sampled.responses)):
            ordinals.append(ordinal)
            inputs.append(_input(embedding, tokenizer, sampled, index))
    vectors = embedding.vectors(inputs)
    # A fixed-size list per row, from one flat array: nothing is copied number by number.
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    nested = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table({"ordinal": pa.array(ordinals, pa.int64()), "vector": nested})


def seed_centers(run: Run, embedding: Embedding) -> np.ndarray:
    """Embed the seed data, which counts as labelled already: initial centres of the selection."""
    if run.config.seed_data is None:
        raise DataError("select.seed_centers needs seed data: add a [seed_data] table or set it to false")
    tokenizer = embedding.tokenizer() if embedding.needs_tokenizer else None
    inputs = [
        _input(embedding, tokenizer, sampled, index)
        for sampled in seed_responses(run)
        for index in range(len(sampled.responses))
    ]
    return embedding.vectors(inputs)


def _input(embedding: Embedding, tokenizer: Any, sampled: Sampled, index: int | None) -> list[int]:
    """Return the token ids of what is embedded. A whole prompt (no index) is represented by its first response."""
    response = sampled.responses[index or 0]
    token_ids = sampled.prompt_token_ids + response.token_ids
    if embedding.text == "prompt" and embedding.uses_policy:
        token_ids = sampled.prompt_token_ids
    return input_of(embedding, tokenizer, sampled.prompt, response.text, token_ids)


def input_of(embedding: Embedding, tokenizer: Any, prompt: str, response: str, token_ids: list[int]) -> list[int]:
    """Return the token ids that stand for a response.

    Args:
        embedding: says what is embedded.
        tokenizer: its own, where it needs one.
        prompt: text.
        response: text.
        token_ids: what the policy read and wrote, which it embeds itself: not those of the text tokenised again.
    """
    if embedding.text == "judge_prompt":
        judged = fill(embedding.rubric, prompt, response)
        if embedding.uses_policy:
            return encode_prompt(tokenizer, judged, "plain")
        return encode_text(tokenizer, judged)
    if embedding.uses_policy:
        return token_ids
    return encode_text(tokenizer, prompt + (f"\n{response}" if embedding.text == "prompt_response" else ""))
