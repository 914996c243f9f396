"""Labels of a study: one actor knows every answer so far, and asks the oracle about the others, each once.

All cells share it, and with it the ledger: a response is paid for once, however many cells choose it.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from rayrl.errors import BudgetExhausted, RayRLError
from rayrl.metrics.progress import track
from rayrl.oracles.pool import BUDGET_EXHAUSTED, OraclePool
from rayrl.records import Judgement
from rayrl.runs.stage_table import QUERY
from rayrl.stages.labelling.ask import CHUNK, wait_for

Ask = Callable[[Sequence[int]], list[float | None]]
"""Ids of responses to the oracle's scores; None where it abstained."""
ANSWER_TIMEOUT_S = 6 * 3600.0
"""Questions may wait for rate limits and retries; the pool bounds each call itself."""
CHUNKS_AT_ONCE = 16
"""Calls of the oracle pool in flight while everything is labelled."""


class Labels:
    """Answers by the id of a response.

    Args:
        oracle: the pool that asks.
        questions: columns id, prompt_id, response_id, prompt and response.
    """

    def __init__(self, oracle: "ActorHandle[OraclePool]", questions: pa.Table) -> None:
        self._oracle: Any = oracle
        self._questions = questions
        self._place = {identifier: place for place, identifier in enumerate(questions["id"].to_pylist())}
        self._scores: dict[int, float | None] = {}

    async def ask(self, ids: Sequence[int]) -> list[float | None]:
        """Return scores in order, and have the oracle judge what is not known yet.

        Raises:
            JudgeFailed: the oracle fails. What it has answered is in the ledger.
            BudgetExhausted: the study has spent what it may.
        """
        unknown = [identifier for identifier in dict.fromkeys(ids) if identifier not in self._scores]
        if unknown:
            answers = await asyncio.gather(
                *(self._judge(unknown[start : start + CHUNK]) for start in range(0, len(unknown), CHUNK))
            )
            for chunk in answers:
                self._scores |= chunk
        return [self._scores[identifier] for identifier in ids]

    async def _judge(self, ids: Sequence[int]) -> dict[int, float | None]:
        rows = self._questions.take([self._place[identifier] for identifier in ids]).to_pylist()
        questions = [
            Judgement(
                prompt_id=row["prompt_id"],
                response_id=row["response_id"],
                prompt=row["prompt"],
                response=row["response"],
            )
            for row in rows
        ]
        try:
            answers: list[Judgement] = await self._oracle.judge.remote(questions, QUERY.pays, QUERY.name)
        except RayTaskError as error:
            if isinstance(error.cause, RayRLError):  # in its own words, and not the actor's traceback
                raise error.cause from None
            raise
        if any(answer.rationale == BUDGET_EXHAUSTED for answer in answers):
            raise BudgetExhausted(
                "max_queries must cover all labels of the study, and is used up, with the calls that were lost when it "
                "was killed; raise it, and run the same command again: what was answered stays in the ledger"
            )
        return {identifier: answer.score for identifier, answer in zip(ids, answers, strict=True)}


def start_labels(oracle: "ActorHandle[OraclePool]", questions: pa.Table) -> Any:
    """Start the actor; it lives as long as its handle."""
    actor: Any = ray.remote(Labels).options(num_cpus=0, max_concurrency=1000)
    return actor.remote(oracle, questions.select(["id", "prompt_id", "response_id", "prompt", "response"]))


def asking(labels: Any) -> Ask:
    """Return the way a cell asks."""

    def ask(ids: Sequence[int]) -> list[float | None]:
        asked = labels.ask.remote([int(identifier) for identifier in ids])
        return wait_for(asked, f"labels of {len(ids)} responses", ANSWER_TIMEOUT_S)

    return ask


def label_all(labels: Any, ids: Sequence[int]) -> None:
    """Have all of these judged, before any cell asks; with a progress bar."""
    parts = [ids[start : start + CHUNK * CHUNKS_AT_ONCE] for start in range(0, len(ids), CHUNK * CHUNKS_AT_ONCE)]
    for part in track(parts, "asking the oracle"):
        asking(labels)(part)
