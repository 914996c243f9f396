"""What a reward model is trained on: the blocks of D, and of the pairs unioned with it, as training rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length
from rayrl.errors import DataError
from rayrl.records import PreferencePair, content_id, from_row
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Preferences

NUM_VALIDATED = 2048
"""Held-out pairs that are scored at most: the accuracy's standard error is then about 0.01."""
TOKENS = pa.list_(pa.field("item", pa.int64(), nullable=False))
ROW_SCHEMA = pa.schema(
    [
        pa.field("chosen_id", pa.string(), nullable=False),
        pa.field("rejected_id", pa.string(), nullable=False),
        pa.field("chosen_token_ids", TOKENS, nullable=False),
        pa.field("rejected_token_ids", TOKENS, nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
"""Token ids are those of prompt and response together."""


@dataclass(frozen=True, kw_only=True)
class PairWeights:
    """How much each pair of D counts (arXiv 2507.15507)."""

    key: str
    table: BlockTable
    """Block i holds `chosen_id`, `rejected_id` and `weight` of every pair of D's block i."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What reward models learn from, and what they are measured on."""

    rows: BlockTable
    num_rows: int
    num_left_out: int
    """Pairs of held-out prompts, and pairs whose sides are the same up to the context."""
    held_out: list[PreferencePair]


def training_data(
    run: Run, stage: str, preferences: Sequence[Preferences], weights: PairWeights | None
) -> TrainingData:
    """D and what is unioned with it as training rows, and the held-out pairs of D.

    Raises:
        DataError: nothing to validate on, or nothing to learn from.
    """
    pairs = preferences[0].table
    held_out = held_out_prompts(pairs, run.config.reward_model.holdout, run.config.seed)
    training = TrainingRows(
        sources=tuple(source.table for source in preferences),
        weights=weights.table if weights else None,
        held_out=held_out,
        max_tokens=context_length(run.config.policy),
    )
    rows, num_rows = training.write(run.folder(stage, "table"))
    if num_rows == 0:
        raise DataError(
            f"{stage} has no pair to train on: the prompts fill the context of {training.max_tokens} tokens, so that "
            "both sides of every pair are the same; shorten the prompts, or raise policy.max_model_len"
        )
    return TrainingData(
        rows=rows,
        num_rows=num_rows,
        num_left_out=sum(source.num_pairs for source in preferences) - num_rows,
        held_out=list(islice(held_out_pairs(pairs, held_out), NUM_VALIDATED)),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """How blocks of pairs become blocks of training rows; travels to the tasks that do it."""

    sources: tuple[BlockTable, ...]
    """D, and what is unioned with it."""
    weights: BlockTable | None
    held_out: frozenset[str]
    """Prompts whose pairs train nothing, wherever they come from."""
    max_tokens: int

    def write(self, url: str) -> tuple[BlockTable, int]:
        """All blocks, made where they are not there yet, and the number of their pairs."""
        table = BlockTable(url, sum(source.num_blocks for source in self.sources))
        counts = map_blocks(table, self.block, concurrency=4, describe=_count, progress="pairs")
        return table, sum(count["num_pairs"] for count in counts)

    def block(self, number: int) -> pa.Table:
        """One block: its pairs without held-out prompts, cut to the context, with their weights.

        Pairs whose sides are the same up to the context teach nothing, and are left out too.
        """
        source, position = self._place(number)
        weights = None
        if self.weights is not None and source is self.sources[0]:
            weights = {(w["chosen_id"], w["rejected_id"]): w["weight"] for w in self.weights.read(position).to_pylist()}
        rows = [
            self._row(pair, 1.0 if weights is None else weights[pair["chosen_id"], pair["rejected_id"]])
            for pair in source.read(position).to_pylist()
            if pair["prompt_id"] not in self.held_out
        ]
        learnable = [row for row in rows if row["chosen_token_ids"] != row["rejected_token_ids"]]
        return pa.Table.from_pylist(learnable, schema=ROW_SCHEMA)

    def _place(self, number: int) -> tuple[BlockTable, int]:
        for source in self.sources:
            if number < source.num_blocks:
                return source, number
            number -= source.num_blocks
        raise IndexError(number)

    def _row(self, pair: dict[str, Any], weight: float) -> dict[str, Any]:
        prompt = pair["prompt_token_ids"]
        return {
            "chosen_id": pair["chosen_id"],
            "rejected_id": pair["rejected_id"],
            "chosen_token_ids": (prompt + pair["chosen_token_ids"])[: self.max_tokens],
            "rejected_token_ids": (prompt + pair["rejected_token_ids"])[: self.max_tokens],
            "weight": weight,
        }


def held_out_prompts(pairs: BlockTable, holdout: float, seed: int) -> frozenset[str]:
    """Prompts of D kept back for validation, drawn by their ids and the seed: the same for every fit on this D.

    Raises:
        DataError: D has fewer than two prompts.
    """
    prompts = sorted(
        {prompt for block in pairs.blocks() for prompt in block["prompt_id"].to_pylist()},
        key=lambda prompt: content_id("holdout", str(seed), prompt),
    )
    if len(prompts) < 2:
        raise DataError(
            f"fit_reward_model needs pairs of at least 2 prompts, one of them to validate on, got {len(prompts)}; "
            "give more preference pairs"
        )
    return frozenset(prompts[: min(max(1, round(holdout * len(prompts))), len(prompts) - 1)])


def held_out_pairs(pairs: BlockTable, held_out: frozenset[str]) -> Iterator[PreferencePair]:
    """Pairs of the held-out prompts of D, one block in memory at a time."""
    for block in pairs.blocks():
        yield from (from_row(row, PreferencePair) for row in block.to_pylist() if row["prompt_id"] in held_out)


def sampled_sequences(rows: BlockTable, num: int, seed: int) -> list[list[int]]:
    """Token ids of about `num` pairs' responses, from blocks drawn by the seed."""
    per_block = max(1, -(-num // rows.num_blocks))
    sequences: list[list[int]] = []
    for number in np.random.default_rng(seed).permutation(rows.num_blocks):
        for row in rows.read(int(number)).slice(0, per_block).to_pylist():
            sequences += [row["chosen_token_ids"], row["rejected_token_ids"]]
        if len(sequences) >= 2 * num:
            break
    return sequences


def _count(block: pa.Table) -> dict[str, int]:
    return {"num_pairs": block.num_rows}
