"""Ordinals: one whole number for every response, or every prompt, across all blocks of a responses table.

Strategies pick ordinals, so that the driver and the shards of the coreset service exchange numbers and not ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayrl.config import RunConfig

MIN_PER_PROMPT = 64
"""Ordinals set aside per prompt at least: seed data may hold more responses to a prompt than `generate.k`."""


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Ordinals in the order of blocks, rows and responses, with room left between prompts."""

    unit: Literal["response", "prompt"]
    """What an ordinal stands for."""
    per_prompt: int
    per_block: int
    min_responses: int = 1
    """Prompts with fewer responses are not numbered where the unit is a prompt."""

    def units(self, block: int, row: int, num_responses: int) -> Iterator[tuple[int, int | None]]:
        """Yield (ordinal, index of the response) of one row's units; the index is None for a whole prompt."""
        first = block * self.per_block + row * self.per_prompt
        if self.unit == "response":
            for index in range(num_responses):
                yield first + index, index
        elif num_responses >= self.min_responses:
            yield first, None

    def block_of(self, ordinal: int) -> int:
        """Return the block that holds a unit."""
        return ordinal // self.per_block


def numbering(config: RunConfig) -> Numbering:
    """Return the run's ordinals.

    Comparisons need prompts with two responses, whatever `select.unit` says; a strategy of pairs needs both responses.
    """
    per_prompt = max(config.generate.k, MIN_PER_PROMPT)
    asks_for_pairs = config.asks_for_comparisons and config.select.asks == "pairs"
    return Numbering(
        unit="response" if asks_for_pairs else "prompt" if config.asks_for_comparisons else config.select.unit,
        per_prompt=per_prompt,
        per_block=config.generate.block_size * per_prompt,
        min_responses=2 if config.asks_for_comparisons else 1,
    )
