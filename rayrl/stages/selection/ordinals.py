"""What the selection picks, a response or a whole prompt, and the ordinal that names one across all blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayrl.config import RunConfig

ROOM = 64
"""Ordinals set aside per prompt at least: seed data may hold more responses to a prompt than k."""


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Ordinals in the order of blocks, rows and responses."""

    unit: Literal["response", "prompt"]
    per_prompt: int
    per_block: int
    least: int = 1
    """Responses without which a prompt is no unit."""

    def units(self, block: int, row: int, num_responses: int) -> Iterator[tuple[int, int | None]]:
        """(ordinal, response's index; None is the whole prompt) of one row's units."""
        first = block * self.per_block + row * self.per_prompt
        if self.unit == "prompt":
            yield from [(first, None)] if num_responses >= self.least else []
        else:
            yield from ((first + i, i) for i in range(num_responses))

    def block_of(self, ordinal: int) -> int:
        """The block that holds a unit."""
        return ordinal // self.per_block


def numbering(config: RunConfig) -> Numbering:
    """The run's ordinals."""
    per_prompt = max(config.generate.k, ROOM)
    return Numbering(
        unit=config.select.unit,
        per_prompt=per_prompt,
        per_block=config.generate.block_size * per_prompt,
        least=2 if config.asks_for_comparisons else 1,
    )
