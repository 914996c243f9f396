"""Two views of every prompt: two responses to it, for the auxiliary loss of a reward model.

A worker reads the prompts from the responses' blocks itself, and takes its share of every batch: they join the steps of
a training whose rows are pairs, and start over when they run out.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import torch

from rayrl.algorithms.information import warmed_up
from rayrl.config import UmlConfig
from rayrl.data.batches import optimizer_batches, share
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import TokenBatch, sequence_batch
from rayrl.records import Row, content_id, drawn_seed

BUFFER_ROWS = 1024
"""Prompts from which a batch is drawn, held with all their responses: 16 blocks of the default size."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """Source of the views, and the settings of their loss."""

    table: BlockTable
    """Rows are `Sampled`."""
    uml: UmlConfig
    batch_size: int
    """Prompts of every step, over all ranks."""
    max_tokens: int
    """Longer sequences lose their ends."""


@dataclass(frozen=True)
class ViewBatch:
    """B different prompts: `tokens` holds their B first views, then their B second ones."""

    tokens: TokenBatch
    weight: float
    """Factor of the mean loss of this share of a batch: over the ranks it adds up to lambda."""
    seed: int
    """Draws the codes."""
    skl_weight: float
    """Of the divergence, at this step of the training."""

    def to(self, device: torch.device) -> "ViewBatch":
        return replace(self, tokens=self.tokens.to(device))

    def weighted(self, factor: float) -> "ViewBatch":
        return replace(self, weight=self.weight * factor)


def view_batches(
    views: Views, seed: int, rank: int, num_ranks: int, *, skip: int, num_steps: int
) -> Iterator[ViewBatch]:
    """Yield a rank's shares of the batches without end, one per step; the same ones after a restart at step `skip`.

    Every epoch draws two other responses of a prompt. The last batch of an epoch, if it is short, is left out: a share
    needs two prompts, since one alone has no negatives. A share's negatives are its own prompts.

    Args:
        views: the prompts, and the settings of their loss.
        seed: draws batches, views and codes.
        rank: this one.
        num_ranks: between which the batches are shared.
        skip: steps that are taken already.
        num_steps: of the whole training, over which the weight of the divergence rises.
    """
    uml, batch_size = views.uml, views.batch_size
    begin, end = uml.skl_rise
    order = np.random.default_rng(seed).permutation(views.table.num_blocks).tolist()
    endless = optimizer_batches(
        lambda: _tables_with_views(views.table, order),
        epochs=sys.maxsize,
        batch_size=batch_size,
        seed=seed,
        buffer_rows=BUFFER_ROWS,
    )
    full = ((epoch, rows) for epoch, rows in endless if len(rows) == batch_size)
    for step, (epoch, rows) in enumerate(islice(full, skip, None), skip):
        first_views: list[list[int]] = []
        second_views: list[list[int]] = []
        own_rows = share(rows, rank, num_ranks)
        for row in own_rows:
            first, second = two_views(row, views.max_tokens, seed, epoch)
            first_views.append(first)
            second_views.append(second)
        yield ViewBatch(
            sequence_batch(first_views + second_views),
            weight=uml.weight * len(own_rows) / batch_size,
            seed=drawn_seed("codes", str(seed), str(step), str(rank)),
            skl_weight=uml.skl_weight * warmed_up(step / num_steps, start=uml.skl_start, begin=begin, end=end),
        )


def prompts_with_views(table: BlockTable) -> Iterator[Row]:
    """Yield the rows with at least two different responses, in order; one block is in memory at a time."""
    for block in _tables_with_views(table, range(table.num_blocks)):
        yield from block.to_pylist()


def _tables_with_views(table: BlockTable, order: Iterable[int]) -> Iterator[pa.Table]:
    """Yield the blocks in an order, without the rows whose responses are all the same."""
    for number in order:
        block = table.read(number)
        texts = [{response["text"] for response in row["responses"]} for row in block.select(["responses"]).to_pylist()]
        yield block.filter(pa.array([len(different) > 1 for different in texts], pa.bool_()))


def two_views(row: Row, max_tokens: int, seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """Return the prompt with two different responses of it, drawn by (seed, epoch, prompt)."""
    # Responses with equal text count once, so that a frequent answer is not its own second view.
    by_text = {response["text"]: response for response in row["responses"]}
    different = list(by_text.values())
    rng = np.random.default_rng(int(content_id("views", str(seed), str(epoch), row["prompt_id"]), 16))
    first, second = rng.choice(len(different), 2, replace=False)
    prompt = row["prompt_token_ids"]
    return (
        (prompt + different[first]["token_ids"])[:max_tokens],
        (prompt + different[second]["token_ids"])[:max_tokens],
    )
