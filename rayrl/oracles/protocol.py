"""What an expert is: it judges one response or compares two, says what that cost, and abstains instead of guessing."""

from dataclasses import dataclass
from typing import Protocol

from rayrl.records import Preference

PREFERENCE_SHARES: dict[Preference, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""A comparison's score: the share of the preference that goes to the first response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One answer of an expert. A failure is an abstention, never a score."""

    score: float | None
    """Of a judgement on the rubric's scale, of a comparison one of `PREFERENCE_SHARES`; None abstains."""
    rationale: str
    """The expert's reasons, or why it abstained."""
    billed: bool = True
    """Whether the attempt may have cost money. An abstention that did not is refunded, to be asked again."""
    cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


class Oracle(Protocol):
    """An expert that judges responses on a rubric, and compares them."""

    @property
    def name(self) -> str:
        """Who judges; part of the key under which a judgement is paid once."""
        ...

    @property
    def comparer(self) -> str:
        """Who compares; part of the key under which a comparison is paid once."""
        ...

    def check(self) -> None:
        """Ask nothing, pay nothing, and make sure that judging can start.

        Raises:
            ConfigError: it cannot; says which setting is wrong and what to do.
        """
        ...

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float:
        """An upper bound on the cost of a judgement (with a second response: of a comparison), known before it."""
        ...

    async def judge(self, prompt: str, response: str) -> Verdict:
        """Judge one response. Never raises for a failed call: it abstains."""
        ...

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        """Say which response is better: one call, in this order. An expert that cannot compare abstains unbilled."""
        ...
