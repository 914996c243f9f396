"""What an expert is: it judges one response, says what that cost, and abstains instead of guessing."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One answer of an expert. A failure is an abstention, never a score."""

    score: float | None
    """On the rubric's scale; None abstains."""
    rationale: str
    """The expert's reasons, or why it abstained."""
    billed: bool = True
    """Whether the attempt may have cost money. An abstention that did not is refunded, to be asked again."""
    cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


class Oracle(Protocol):
    """An expert that judges responses on a rubric."""

    @property
    def name(self) -> str:
        """Who judges; part of the key under which a judgement is paid once."""
        ...

    def check(self) -> None:
        """Ask nothing, pay nothing, and make sure that judging can start.

        Raises:
            ConfigError: it cannot; says which setting is wrong and what to do.
        """
        ...

    def estimate_usd(self, prompt: str, response: str) -> float:
        """An upper bound on the cost of one judgement, known before it is asked for."""
        ...

    async def judge(self, prompt: str, response: str) -> Verdict:
        """Judge one response. Never raises for a failed call: it abstains."""
        ...
