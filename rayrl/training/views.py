"""Two views of every prompt: two responses to it, for the auxiliary loss of a reward model.

A worker reads its prompts from the responses' blocks itself: they join the steps of a training whose rows are pairs,
and start over whenever they run out.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from rayrl.config import UmlConfig
from rayrl.data.batches import Row, optimizer_batches
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import TokenBatch, collate
from rayrl.records import content_id


@dataclass(frozen=True, kw_only=True)
class Views:
    """Where the views come from, and what is made of them."""

    table: BlockTable
    """Rows are `Sampled`."""
    uml: UmlConfig
    max_tokens: int
    """Longer sequences lose their ends."""


@dataclass(frozen=True)
class ViewBatch:
    """B different prompts: `tokens` holds their B first views, then their B second ones."""

    tokens: TokenBatch
    weight: float
    """Of the batch's mean loss."""
    seed: int
    """Draws the codes."""

    def to(self, device: torch.device) -> "ViewBatch":
        return replace(self, tokens=self.tokens.to(device))

    def weighted(self, factor: float) -> "ViewBatch":
        return replace(self, weight=self.weight * factor)


def view_batches(views: Views, seed: int, rank: int, num_ranks: int, *, skip: int) -> Iterator[ViewBatch]:
    """A rank's batches without end, one per optimizer step; the same ones after a restart at step `skip`.

    Every epoch draws two other responses of a prompt. Each prompt is some rank's; a batch of one prompt, which has no
    negatives, is left out.
    """
    size = max(2, -(-views.uml.batch_size // num_ranks))
    endless = optimizer_batches(
        lambda: islice(prompts_with_views(views.table), rank, None, num_ranks),
        epochs=sys.maxsize,
        batch_size=size,
        seed=seed,
    )
    wide = ((epoch, rows) for epoch, rows in endless if len(rows) > 1)
    for step, (epoch, rows) in enumerate(islice(wide, skip, None), skip):
        pairs = [two_views(row, views.max_tokens, seed, epoch) for row in rows]
        sequences = [view for side in zip(*pairs, strict=True) for view in side]
        tokens = collate([s[:-1] for s in sequences], [s[-1:] for s in sequences])
        code_seed = int(content_id("codes", str(seed), str(step), str(rank)), 16) >> 1
        yield ViewBatch(tokens, views.uml.weight, code_seed)


def prompts_with_views(table: BlockTable) -> Iterator[Row]:
    """Rows with at least two different responses, in order; one block in memory at a time."""
    for block in table.blocks():
        yield from (row for row in block.to_pylist() if len({r["text"] for r in row["responses"]}) > 1)


def two_views(row: Row, max_tokens: int, seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """Prompt with response, for two different responses drawn by (seed, epoch, prompt)."""
    different = list({response["text"]: response for response in row["responses"]}.values())
    drawn_by = int(content_id("views", str(seed), str(epoch), row["prompt_id"]), 16)
    drawn = np.random.default_rng(drawn_by).choice(len(different), 2, replace=False)
    first, second = (row["prompt_token_ids"] + different[i]["token_ids"] for i in drawn)
    return first[:max_tokens], second[:max_tokens]
