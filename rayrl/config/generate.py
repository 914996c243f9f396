"""Settings of on-policy sampling."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table


class GenerateConfig(Table):
    """On-policy sampling: k responses for each prompt."""

    source: Literal["policy", "seed"] = "policy"
    """"seed" is the off-policy control: the seed data's own responses are queried instead of M1's."""
    k: int = Field(default=4, gt=0)
    """Responses per prompt."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the sampling; 0 always takes the likeliest token."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the most probable tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most probable tokens; 0 is off."""
    max_tokens: int = Field(default=512, gt=0)
    """Longest response."""
    stop: list[str] = Field(default=[])
    """Texts that end a response."""
    block_size: int = Field(default=64, gt=0)
    """Prompts per block: the unit of work, of memoisation and of resume."""

    @property
    def is_greedy(self) -> bool:
        """Return whether all responses to a prompt are the same: the most probable token is taken each time."""
        return self.temperature == 0 or self.top_k == 1
