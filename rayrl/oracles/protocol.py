"""Protocol of an oracle: judge one response or compare two, account for the cost, and abstain instead of guessing."""

from dataclasses import dataclass
from typing import Protocol

from rayrl.records import Preference

PREFERENCE_SHARES: dict[Preference, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Score of a comparison: the share of the preference that goes to the first response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result of one call of an oracle. A failure is an abstention or a failed judge, never a score."""

    score: float | None
    """Of a judgement a number on the rubric's scale, of a comparison one of `PREFERENCE_SHARES`; None abstains."""
    rationale: str
    """The oracle's reasons, or why it abstained."""
    billed: bool = True
    """Whether the call may have cost money. An abstention that did not is refunded, and may be asked again."""
    is_readable: bool = True
    """False: nobody could read the answer, or none came. Once in a while that is the item's fault; several in a row are
    a failed judge, and what they were about is asked again."""
    failure: str | None = None
    """The judge failed, and not the item: what happened, and the remedy. The question stays unasked, and the asking
    stops. A verdict may have a score as well, where the judge broke what was agreed with it."""
    cost_usd: float | None = None
    """None: the oracle has no price."""
    input_tokens: int = 0
    output_tokens: int = 0
    disagreement: float | None = None
    """Standard deviation of the scores, where several judges (or several samples of one) were asked."""

    @property
    def is_refunded(self) -> bool:
        """Return whether the call gives its reservation back: an abstention that cost nothing does."""
        return self.score is None and not self.billed


class Named(Protocol):
    """Name of an oracle, or of people, as it stands in the keys of their answers."""

    @property
    def name(self) -> str:
        """Name of who judges; part of the key under which a judgement is paid once."""
        ...

    @property
    def comparer(self) -> str:
        """Name of who compares; part of the key under which a comparison is paid once."""
        ...


class Oracle(Named, Protocol):
    """Judges responses on a rubric, and compares them. Built from its config and the rubric."""

    def check(self) -> None:
        """Make sure that judging can start, without asking or paying for anything.

        Raises:
            ConfigError: it cannot; names the wrong setting and the remedy.
        """
        ...

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        """Bound the cost of a judgement (with a second response: of a comparison) from above, before the call.

        None: the oracle has no price.
        """
        ...

    async def judge(self, prompt: str, response: str) -> Verdict:
        """Judge one response. A failed call abstains or tells of a failed judge, and does not raise."""
        ...

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        """Compare two responses in this order, in one call. An oracle that cannot compare abstains unbilled."""
        ...
