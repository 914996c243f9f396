"""Two views of every prompt: two responses to it, for the auxiliary loss of a reward model.

A worker reads its prompts from the responses' blocks itself: they join the steps of a training whose rows are pairs,
and start over when they run out.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from rayrl.config import UmlConfig
from rayrl.data.batches import optimizer_batches
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import TokenBatch, sequence_batch
from rayrl.records import Row, content_id, drawn_seed


@dataclass(frozen=True, kw_only=True)
class Views:
    """Source of the views, and the settings of their loss."""

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
    """Factor of the batch's mean loss."""
    seed: int
    """Draws the codes."""

    def to(self, device: torch.device) -> "ViewBatch":
        return replace(self, tokens=self.tokens.to(device))

    def weighted(self, factor: float) -> "ViewBatch":
        return replace(self, weight=self.weight * factor)


def view_batches(views: Views, seed: int, rank: int, num_ranks: int, *, skip: int) -> Iterator[ViewBatch]:
    """Yield a rank's batches without end, one per optimizer step; the same ones after a restart at step `skip`.

    Every epoch draws two other responses of a prompt. Each prompt belongs to one rank. A batch of one prompt is left
    out.
    """
    rank_batch_size = max(2, -(-views.uml.batch_size // num_ranks))  # one prompt alone has no negatives
    endless = optimizer_batches(
        lambda: islice(prompts_with_views(views.table), rank, None, num_ranks),
        epochs=sys.maxsize,
        batch_size=rank_batch_size,
        seed=seed,
    )
    with_negatives = ((epoch, rows) for epoch, rows in endless if len(rows) > 1)
    for step, (epoch, rows) in enumerate(islice(with_negatives, skip, None), skip):
        first_views: list[list[int]] = []
        second_views: list[list[int]] = []
        for row in rows:
            first, second = two_views(row, views.max_tokens, seed, epoch)
            first_views.append(first)
            second_views.append(second)
        yield ViewBatch(
            sequence_batch(first_views + second_views),
            views.uml.weight,
            drawn_seed("codes", str(seed), str(step), str(rank)),
        )


def prompts_with_views(table: BlockTable) -> Iterator[Row]:
    """Yield the rows with at least two different responses, in order; one block is in memory at a time."""
    for block in table.blocks():
        for row in block.to_pylist():
            if len({response["text"] for response in row["responses"]}) > 1:
                yield row


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
