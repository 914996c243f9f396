"""What the expert can be asked, a judgement or a comparison, and the record that the answer becomes.

The ledger and the pool treat both alike, as a `Question`: what it says is its key, and the key is paid for once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from rayrl.oracles.protocol import PREFERENCE_SHARES, Oracle, Verdict
from rayrl.records import Comparison, Judgement, Preference, Status, content_id

Answer = TypeVar("Answer", covariant=True)

_PREFERENCES: dict[float | None, Preference | None] = {share: name for name, share in PREFERENCE_SHARES.items()}
_PREFERENCES[None] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a question."""

    key: str
    status: Status
    score: float | None
    """As in `Verdict`."""
    rationale: str
    purpose: str
    cost_usd: float


class Question(Protocol[Answer]):
    """One question to the expert."""

    @property
    def key(self) -> str:
        """What is paid for once."""
        ...

    def ids(self) -> dict[str, str]:
        """What is asked about, as the answer's record names it."""
        ...

    def columns(self) -> dict[str, Any]:
        """The whole question, in the ledger's columns."""
        ...

    def estimate_usd(self, oracle: Oracle) -> float:
        """Upper bound on its price."""
        ...

    async def put_to(self, oracle: Oracle) -> Verdict:
        """Ask it."""
        ...

    def answered(self, outcome: Outcome) -> Answer:
        """The record of an outcome, addressed to whoever asks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """How good is this response?"""

    prompt_id: str
    response_id: str
    prompt: str
    response: str
    oracle: str
    """`Oracle.name`."""
    rubric: str
    """`Rubric.version`."""

    @property
    def key(self) -> str:
        return content_id(self.prompt, self.response, self.oracle, self.rubric)

    def ids(self) -> dict[str, str]:
        return {"prompt_id": self.prompt_id, "response_id": self.response_id}

    def columns(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "response_id": self.response_id,
            "second_id": None,
            "prompt": self.prompt,
            "response": self.response,
            "second": None,
            "oracle": self.oracle,
        }

    def estimate_usd(self, oracle: Oracle) -> float:
        return oracle.estimate_usd(self.prompt, self.response)

    async def put_to(self, oracle: Oracle) -> Verdict:
        return await oracle.judge(self.prompt, self.response)

    def answered(self, outcome: Outcome) -> Judgement:
        return judgement(self.columns(), outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairQuery:
    """Which of these two responses is better? In the other order it is another question."""

    prompt_id: str
    first_id: str
    second_id: str
    prompt: str
    first: str
    second: str
    oracle: str
    """`Oracle.comparer`."""
    rubric: str
    """`pairwise_version` of the rubric."""

    @property
    def key(self) -> str:
        return content_id(self.prompt, self.first, self.second, self.oracle, self.rubric)

    def ids(self) -> dict[str, str]:
        return {"prompt_id": self.prompt_id, "first_id": self.first_id, "second_id": self.second_id}

    def columns(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "response_id": self.first_id,
            "second_id": self.second_id,
            "prompt": self.prompt,
            "response": self.first,
            "second": self.second,
            "oracle": self.oracle,
        }

    def estimate_usd(self, oracle: Oracle) -> float:
        return oracle.estimate_usd(self.prompt, self.first, self.second)

    async def put_to(self, oracle: Oracle) -> Verdict:
        return await oracle.compare(self.prompt, self.first, self.second)

    def answered(self, outcome: Outcome) -> Comparison:
        return comparison(self.columns(), outcome)


def judgement(columns: Mapping[str, Any], outcome: Outcome) -> Judgement:
    """The ledger's columns and an outcome as a judgement."""
    asked = {name: columns[name] for name in ("prompt_id", "response_id", "prompt", "response", "oracle")}
    return Judgement(**asked, **asdict(outcome))


def comparison(columns: Mapping[str, Any], outcome: Outcome) -> Comparison:
    """The ledger's columns and an outcome as a comparison."""
    asked = {name: columns[name] for name in ("prompt_id", "second_id", "prompt", "second", "oracle")}
    settled = asdict(outcome)
    preference = _PREFERENCES[settled.pop("score")]
    return Comparison(
        **asked, **settled, first_id=columns["response_id"], first=columns["response"], preference=preference
    )
