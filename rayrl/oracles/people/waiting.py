"""Waiting for people: questions are put on their desk, answers taken into the ledger, and a run parked in between.

Nothing waits here: either enough questions are answered, or `WaitingForPeople` says what is missing and where. A
question becomes an attempt in the ledger only together with its answer, so that a run that is killed loses none.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from rayrl.config import PeopleConfig
from rayrl.errors import JudgeFailed, UsdExhausted, WaitingForPeople
from rayrl.oracles.ledger import Ledger, Reserved
from rayrl.oracles.people.desk import Annotation, Desk, Kind, kind_of, verdict_of
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.questions import BUDGET_EXHAUSTED, Question, refused
from rayrl.runs.stage_table import Purpose

UNANSWERED = "not answered by people"
"""Rationale of an abstention on a question that a run did not wait for any longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What a parked run waits for."""

    stage: str
    kind: Kind
    place: str
    """Where the questions lie."""
    keys: list[str]
    """Of the questions that are not answered yet."""
    num_questions: int
    num_answered: int
    num_needed: int
    """Answered questions with which the run goes on."""
    num_people: int
    """Answers that a question needs."""

    def in_words(self) -> str:
        """Say what is missing, and where it is to be given."""
        by = "" if self.num_people == 1 else f", each by {self.num_people} people"
        return (
            f"waiting for people: {self.num_answered} of {self.num_questions} questions of {self.stage} are answered"
            f"{by}, and {self.num_needed} are needed\n  they lie in {self.place}"
        )


class People:
    """Answers questions from what lies on a desk.

    Args:
        desk: where people answer.
        config: when there is enough.
        ledger: takes the answers.
        is_only: whether nobody else answers. Beside judges, what people do not answer is left to those.
    """

    def __init__(self, desk: Desk, config: PeopleConfig, ledger: Ledger, *, is_only: bool) -> None:
        self.desk = desk
        self._config = config
        self._ledger = ledger
        self._is_only = is_only
        prices = config.prices()
        self._usd = None if prices is None else prices.bound_usd(0)
        self._lock = asyncio.Lock()
        self.waiting: Waiting | None = None
        """What was missing the last time."""

    async def answers(self, questions: Sequence[Question], purpose: Purpose, stage: str) -> list[Question]:
        """Answer questions of one kind, in order; those beyond the budget, and unanswered ones, are abstentions.

        Args:
            questions: with their keys (`rayrl.oracles.questions.address`).
            purpose: the budget that pays.
            stage: asks.

        Raises:
            WaitingForPeople: fewer are answered than `enough`, and the deadline is not over. All lie on the desk.
            UsdExhausted: the budget in USD does not pay for all labels; nobody is asked.
            JudgeFailed: the deadline is over, people are the only oracle, and none has answered. All lie on the desk.
        """
        if not questions:
            return []
        # One at a time: two stages' questions must not take the same budget, or be put down twice.
        async with self._lock:
            kind = kind_of(questions[0])
            by_key = {question.key: question for question in questions}
            known = self._ledger.answered(by_key)
            asked = self._affordable({key: each for key, each in by_key.items() if key not in known}, purpose)
            # Read before anything is written there.
            annotations = await asyncio.to_thread(self.desk.collect, kind)
            is_over = self._config.deadline is not None and datetime.now(UTC) >= self._config.deadline
            # In floating point 0.55 of 100 is a little more than 55.
            num_needed = math.ceil(round(self._config.enough * (len(known) + len(asked)), 9))
            ready = _ready(asked, annotations, self._config.num_people)
            self._take(ready, annotations, kind, stage)
            missing = {key: question for key, question in asked.items() if key not in ready}
            num_answered = len(known) + len(ready)
            if num_answered < num_needed and not is_over:
                await self._ledger.sync()
                await asyncio.to_thread(self.desk.post, list(missing.values()))
                self.waiting = Waiting(
                    stage=stage,
                    kind=kind,
                    place=self.desk.place(kind),
                    keys=list(missing),
                    num_questions=len(known) + len(asked),
                    num_answered=num_answered,
                    num_needed=num_needed,
                    num_people=self._config.num_people,
                )
                raise WaitingForPeople(self.waiting.in_words())
            # The waiting is over: an answer of fewer people than were asked for is better than none.
            some = _ready(missing, annotations, 1)
            self._take(some, annotations, kind, stage)
            await self._ledger.sync()
            answered = {*known, *ready, *some}
            if self._is_only and asked and not answered:
                await asyncio.to_thread(self.desk.post, list(missing.values()))
                raise JudgeFailed(
                    f"none of {len(asked)} questions of {stage} is answered, and oracle.deadline is over; they lie in "
                    f"{self.desk.place(kind)}: set a later one, and run the same command again"
                )
            self.waiting = None
            return [self._answer(question, stage, answered, is_asked=question.key in asked) for question in questions]

    def _affordable(self, questions: dict[str, Question], purpose: Purpose) -> dict[str, Question]:
        """Return the questions that the budgets pay for.

        Raises:
            UsdExhausted: these are labels, and the budget in USD does not pay for as many as that of queries.
        """
        num_left, num_payable = self._ledger.num_left(purpose), self._ledger.num_payable(self._usd)
        num_wanted = min(len(questions), num_left)
        if purpose == "label" and num_payable < num_wanted:
            raise UsdExhausted(
                f"oracle.budget_usd must cover every label: it pays for {num_payable:g} of {num_wanted} more questions "
                "to people, none of which was asked; raise it, or lower select.budget, and run the same command again"
            )
        return dict(list(questions.items())[: int(min(num_wanted, num_payable))])

    def _take(
        self,
        ready: Mapping[str, Question],
        annotations: Mapping[str, Sequence[Annotation]],
        kind: Kind,
        stage: str,
    ) -> None:
        """Write answers into the ledger; nothing is awaited, so that each is there whole or not at all."""
        for key, question in ready.items():
            theirs = list(annotations[key])[: self._config.num_people]  # so many are paid for
            reserved = self._ledger.reserve(question, self._usd, stage=stage)
            assert isinstance(reserved, Reserved), "it was not answered a moment ago"
            self._ledger.commit(reserved, self._priced(verdict_of(theirs, kind, self._config.combine), len(theirs)))
            named = [replace(each, annotator=each.annotator or f"person {n}") for n, each in enumerate(theirs, 1)]
            self._ledger.annotate(key, map(asdict, named))

    def _priced(self, verdict: Verdict, num_answers: int) -> Verdict:
        usd = self._config.usd_per_answer
        return replace(verdict, cost_usd=None if usd is None else num_answers * usd)

    def _answer(self, question: Question, stage: str, answered: set[str], *, is_asked: bool) -> Question:
        if question.key not in answered:
            return refused(question, UNANSWERED if is_asked else BUDGET_EXHAUSTED)
        found = self._ledger.reserve(question, self._usd, stage=stage)
        assert not isinstance(found, Reserved), "it is answered"
        return found


def _ready(
    questions: Mapping[str, Question], annotations: Mapping[str, Sequence[Annotation]], num_people: int
) -> dict[str, Question]:
    """Return the questions that so many people have answered."""
    return {key: each for key, each in questions.items() if len(annotations.get(key, ())) >= num_people}
