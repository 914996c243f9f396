"""Labels of a study: one actor knows every answer so far, and asks the oracle about the others, each once.

All cells share it, and with it the ledger: a response, or a pair of them, is paid for once, however many cells choose
it.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Int64
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from rayrl.algorithms.comparisons import TURNED, Order, queries_per_pair
from rayrl.config.oracle import ReplayOracleConfig
from rayrl.errors import BudgetExhausted, RayRLError
from rayrl.metrics.progress import track
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.pool import OraclePool
from rayrl.oracles.questions import BUDGET_EXHAUSTED
from rayrl.oracles.replay import ReplayOracle
from rayrl.records import Comparison, Judgement, Preference
from rayrl.runs.stage_table import PREFERENCES, QUERY
from rayrl.stages.labelling.ask import CHUNK, wait_for
from rayrl.stages.labelling.ask_pairs import in_drawn_order, pair_question, questions, verdict
from rayrl.stages.labelling.comparisons import WON

Question = tuple[int, ...]
"""Id of a response to be scored, or ids of two to be compared."""


class Ask(Protocol):
    """The way a cell asks."""

    def __call__(self, questions: Int64[np.ndarray, "m u"], *, held_out: bool = False) -> list[float | None]:
        """Return the answers in order: scores, or of pairs 1 if the first response won, 0.5 for a tie, 0 otherwise.

        Args:
            questions: ids of the response, or of both responses.
            held_out: whether these are the answers that the evaluator is compared with, which may be others than the
                oracle's (`truth`).

        Returns:
            None where there is no answer.
        """
        ...


ANSWER_TIMEOUT_S = 6 * 3600.0
"""Questions may wait for rate limits and retries; the pool bounds each call itself."""
CHUNKS_AT_ONCE = 16
"""Calls of the oracle pool in flight while everything is labelled."""


class Labels:
    """Answers by question.

    Args:
        oracle: the pool that asks.
        responses: columns id, prompt_id, response_id, prompt and response.
        order: of comparisons; "both" asks twice about a pair.
        truth: answers about held-out prompts in place of the oracle; None is the oracle.
    """

    def __init__(
        self, oracle: "ActorHandle[OraclePool]", responses: pa.Table, order: Order, truth: ReplayOracle | None
    ) -> None:
        self._oracle: Any = oracle
        self._responses = responses
        self._order: Order = order
        self._truth = truth
        self._place = {identifier: place for place, identifier in enumerate(responses["id"].to_pylist())}
        self._answers: dict[Question, float | None] = {}

    async def ask(self, questions: Sequence[Question], held_out: bool = False) -> list[float | None]:
        """Return answers in order, and ask the oracle what is not known yet. A pair has one answer in either order.

        Raises:
            JudgeFailed: the oracle fails. What it has answered is in the ledger.
            BudgetExhausted: the study has spent what it may.
        """
        if held_out and self._truth is not None:
            return [await self._true_answer(self._truth, question) for question in questions]
        in_order = [tuple(sorted(question)) for question in questions]
        unknown = [question for question in dict.fromkeys(in_order) if question not in self._answers]
        answers = await asyncio.gather(
            *(self._answer(unknown[start : start + CHUNK]) for start in range(0, len(unknown), CHUNK))
        )
        for chunk in answers:
            self._answers |= chunk
        found = [self._answers[question] for question in in_order]
        return [
            answer if answer is None or question == asked else 1.0 - answer
            for answer, question, asked in zip(found, questions, in_order, strict=True)
        ]

    async def _true_answer(self, truth: ReplayOracle, question: Question) -> float | None:
        rows = self._rows(question)
        texts = [row["response"] for row in rows]
        if len(texts) == 1:
            return (await truth.judge(rows[0]["prompt"], texts[0])).score
        return (await truth.compare(rows[0]["prompt"], texts[0], texts[1])).score

    async def _answer(self, asked: Sequence[Question]) -> dict[Question, float | None]:
        found = await (self._judge(asked) if len(asked[0]) == 1 else self._compare(asked))
        return dict(zip(asked, found, strict=True))

    async def _judge(self, asked: Sequence[Question]) -> list[float | None]:
        judgements = [
            Judgement(
                prompt_id=row["prompt_id"],
                response_id=row["response_id"],
                prompt=row["prompt"],
                response=row["response"],
            )
            for row in self._rows([identifier for question in asked for identifier in question])
        ]
        answers: list[Judgement] = await self._paid(self._oracle.judge.remote(judgements, QUERY.pays, QUERY.name))
        return [answer.score for answer in answers]

    async def _compare(self, asked: Sequence[Question]) -> list[float | None]:
        """Compare pairs, each in its drawn order or in both; return the wins of the first id."""
        pairs: list[Comparison] = []
        for question in asked:
            rows = self._rows(question)
            # By the response's id alone, so that every cell asks in the same order.
            sides = in_drawn_order(0, *((row["response_id"], row["response"]) for row in rows))
            pairs.append(pair_question(rows[0]["prompt_id"], rows[0]["prompt"], sides))
        put = [each for pair in pairs for each in questions(pair, self._order)]
        answers: list[Comparison] = await self._paid(
            self._oracle.compare.remote(put, PREFERENCES.pays, PREFERENCES.name)
        )
        size = queries_per_pair(self._order)
        wins: list[float | None] = []
        for number, ((first_id, _), pair) in enumerate(zip(asked, pairs, strict=True)):
            decided: Preference | None = verdict(answers[size * number : size * (number + 1)])
            is_turned = self._rows([first_id])[0]["response_id"] != pair.first_id
            wins.append(None if decided is None else WON[TURNED[decided] if is_turned else decided])
        return wins

    def _rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return self._responses.take([self._place[identifier] for identifier in ids]).to_pylist()

    async def _paid(self, asking: Any) -> Any:
        """Wait for the oracle pool, and end the study where it cannot answer.

        Raises:
            JudgeFailed: the oracle fails.
            BudgetExhausted: the study has spent what it may.
        """
        try:
            answers: Any = await asking
        except RayTaskError as error:
            if isinstance(error.cause, RayRLError):  # in its own words, and not the actor's traceback
                raise error.cause from None
            raise
        if any(answer.rationale == BUDGET_EXHAUSTED for answer in answers):
            raise BudgetExhausted(
                "max_queries must cover all labels of the study, and is used up, with the calls that were lost when it "
                "was killed; raise it, and run the same command again: what was answered stays in the ledger"
            )
        return answers


def start_labels(
    oracle: "ActorHandle[OraclePool]",
    responses: pa.Table,
    order: Order,
    truth: ReplayOracleConfig | None,
    rubric: Rubric,
) -> Any:
    """Start the actor; it lives as long as its handle."""
    actor: Any = ray.remote(Labels).options(num_cpus=0, max_concurrency=1000)
    texts = responses.select(["id", "prompt_id", "response_id", "prompt", "response"])
    return actor.remote(oracle, texts, order, None if truth is None else ReplayOracle(truth, rubric))


def asking(labels: Any) -> Ask:
    """Return the way a cell asks."""

    def ask(questions: Int64[np.ndarray, "m u"], *, held_out: bool = False) -> list[float | None]:
        asked = labels.ask.remote([tuple(question) for question in questions.tolist()], held_out)
        return wait_for(asked, f"{len(questions)} labels", ANSWER_TIMEOUT_S)

    return ask


def label_all(labels: Any, questions: Int64[np.ndarray, "m u"]) -> None:
    """Have all of these answered, before any cell asks; with a progress bar."""
    size = CHUNK * CHUNKS_AT_ONCE
    parts = [questions[start : start + size] for start in range(0, len(questions), size)]
    for part in track(parts, "asking the oracle"):
        asking(labels)(part)
