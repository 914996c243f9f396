"""Training rows of a reward model: the blocks of D, and of the pairs unioned with it; and the held-out pairs of D.

Prompts are held out, not pairs: all pairs of a held-out prompt are kept from the training, wherever they come from. The
split follows from the prompts' ids and the seed, so that every fit on the same D is validated on the same pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length
from rayrl.errors import DataError
from rayrl.records import PreferencePair, from_row, from_table, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import RewardModelMetrics
from rayrl.runs.stage_table import Stage
from rayrl.stages.artifacts import Preferences
from rayrl.stages.fitting import drawn_holdout

NUM_VALIDATED = 2048
"""Held-out pairs that are scored at most: the accuracy's standard error is then about 0.01."""
CONCURRENCY = 4
"""Blocks in flight; they only have to be read and written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPair:
    """One pair as the trainer reads it."""

    chosen_id: str
    rejected_id: str
    chosen_token_ids: list[int]
    """Prompt and response together, cut to the context; so are the rejected ones."""
    rejected_token_ids: list[int]
    weight: float


@dataclass(frozen=True, kw_only=True)
class PairWeights:
    """Importance weights of D's pairs (arXiv 2507.15507)."""

    key: str
    table: BlockTable
    """Block i holds `chosen_id`, `rejected_id` and `weight` of every pair of D's block i."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows that train reward models, and the pairs that measure them."""

    rows: BlockTable
    """`TrainingPair`s."""
    num_rows: int
    num_left_out: int
    """Pairs of held-out prompts, and pairs whose sides are the same up to the context."""
    held_out: list[PreferencePair]
    held_out_rows: list[TrainingPair]
    """The same as training rows, without pairs whose sides are the same up to the context."""


def training_data(
    run: Run, stage: Stage[RewardModelMetrics], preferences: Sequence[Preferences], weights: PairWeights | None
) -> TrainingData:
    """Make the training rows of D and of what is unioned with it, and read the held-out pairs of D.

    Raises:
        DataError: nothing to validate on, or nothing to learn from.
    """
    pairs = preferences[0].table
    held_out = held_out_prompts(pairs, run.config.reward_model.holdout, run.seed)
    training = TrainingRows(
        sources=tuple(source.table for source in preferences),
        weights=weights.table if weights else None,
        held_out=held_out,
        max_tokens=context_length(run.config.policy),
    )
    rows, num_rows = training.write(run.folder(stage, "table"))
    validated = list(islice(held_out_pairs(pairs, held_out), NUM_VALIDATED))
    if num_rows == 0:
        raise DataError(
            f"{stage.name} has no pair to train on: the prompts fill the context of {training.max_tokens} tokens, so "
            "that both sides of every pair are the same; shorten the prompts, or raise policy.max_model_len"
        )
    return TrainingData(
        rows=rows,
        num_rows=num_rows,
        num_left_out=sum(source.num_pairs for source in preferences) - num_rows,
        held_out=validated,
        held_out_rows=[row for pair in validated if (row := training.row(pair, weight=1.0)) is not None],
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """All that turns blocks of pairs into blocks of training rows; travels to the tasks that do it."""

    sources: tuple[BlockTable, ...]
    """D, then what is unioned with it."""
    weights: BlockTable | None
    """Of D's pairs, block by block; None, and everywhere else, is a weight of 1."""
    held_out: frozenset[str]
    """Prompts whose pairs train nothing, wherever they come from."""
    max_tokens: int

    def write(self, url: str) -> tuple[BlockTable, int]:
        """Make all blocks that are not there yet; return the table and the number of its pairs."""
        table = BlockTable(url, sum(source.num_blocks for source in self.sources))
        counts = map_blocks(
            table,
            self.block,
            concurrency=CONCURRENCY,
            describe=lambda block: {"num_pairs": block.num_rows},
            progress="pairs",
        )
        return table, sum(count["num_pairs"] for count in counts)

    def block(self, number: int) -> pa.Table:
        """Make one block: its pairs without held-out prompts, cut to the context, with their weights."""
        source, position = self._place(number)
        weights: dict[tuple[str, str], float] | None = None
        if self.weights is not None and source is self.sources[0]:
            weights = {}
            for row in self.weights.read(position).to_pylist():
                weights[row["chosen_id"], row["rejected_id"]] = row["weight"]
        rows: list[TrainingPair] = []
        for pair in from_table(source.read(position), PreferencePair):
            if pair.prompt_id in self.held_out:
                continue
            # By lookup, not by position; a pair without a weight of its own is a mistake and fails here.
            weight = 1.0 if weights is None else weights[pair.chosen_id, pair.rejected_id]
            row = self.row(pair, weight)
            if row is not None:
                rows.append(row)
        return to_table(rows, TrainingPair)

    def _place(self, number: int) -> tuple[BlockTable, int]:
        """Find the source, and the block of it, that a block of the training rows is made from."""
        for source in self.sources:
            if number < source.num_blocks:
                return source, number
            number -= source.num_blocks
        raise IndexError(number)

    def row(self, pair: PreferencePair, weight: float) -> TrainingPair | None:
        """Make the row of a pair; None for sides that differ only beyond the context, which teach nothing."""
        chosen = (pair.prompt_token_ids + pair.chosen_token_ids)[: self.max_tokens]
        rejected = (pair.prompt_token_ids + pair.rejected_token_ids)[: self.max_tokens]
        if chosen == rejected:
            return None
        return TrainingPair(
            chosen_id=pair.chosen_id,
            rejected_id=pair.rejected_id,
            chosen_token_ids=chosen,
            rejected_token_ids=rejected,
            weight=weight,
        )


def held_out_prompts(pairs: BlockTable, holdout: float, seed: int) -> frozenset[str]:
    """Draw the prompts of D that are kept back for validation, by their ids and the seed.

    Raises:
        DataError: D has fewer than two prompts.
    """
    prompts: set[str] = set()
    for block in pairs.blocks():
        prompts.update(block["prompt_id"].to_pylist())
    if len(prompts) < 2:
        raise DataError(
            f"a reward model needs pairs of at least 2 prompts, one of them to validate on, got {len(prompts)}; "
            "give more preference pairs"
        )
    return drawn_holdout(prompts, holdout, seed)


def held_out_pairs(pairs: BlockTable, held_out: frozenset[str]) -> Iterator[PreferencePair]:
    """Read the pairs of the held-out prompts of D, one block in memory at a time."""
    for block in pairs.blocks():
        for row in block.to_pylist():
            if row["prompt_id"] in held_out:
                yield from_row(row, PreferencePair)


def sampled_sequences(rows: BlockTable, num: int, seed: int) -> list[list[int]]:
    """Read the token ids of both sides of about `num` pairs, from blocks drawn by the seed."""
    num_per_block = max(1, -(-num // rows.num_blocks))
    sequences: list[list[int]] = []
    for number in np.random.default_rng(seed).permutation(rows.num_blocks):
        for row in rows.read(int(number)).slice(0, num_per_block).to_pylist():
            sequences += [row["chosen_token_ids"], row["rejected_token_ids"]]
        # Blocks may be smaller than that, so further ones are read until there are enough.
        if len(sequences) >= 2 * num:
            break
    return sequences
