"""Oracle pool: the one named actor that asks the oracle, and owns the ledger, the connections and the global limits.

`OraclePool` is a plain class and runs without Ray. A restarted actor opens the ledger again and goes on: paid
questions are answered from there, so that a caller may simply repeat its call. The pool does not choose what is asked.
Retries of a call are the oracle's implementation's; the pool notices when the judge itself has failed, and then asks
nothing more (`rayrl.oracles.breaker`).
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.algorithms.routing import in_doubt
from rayrl.config import OracleBase, PanelOracleConfig
from rayrl.errors import BudgetExhausted, JudgeFailed, RayRLError, RunDirectoryError, StageTimeout, UsdExhausted
from rayrl.metrics import meters
from rayrl.metrics.fleet_state import FleetState
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.breaker import Breaker
from rayrl.oracles.build import build_desk, build_oracle, check_oracle
from rayrl.oracles.ledger import Ledger, Outlook, Reserved
from rayrl.oracles.limits import Slots
from rayrl.oracles.people.waiting import People, Waiting
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.questions import (
    BUDGET_EXHAUSTED,
    Question,
    address,
    call,
    estimate_usd,
    refused,
    reused,
    settled_by,
)
from rayrl.records import Comparison, Judgement
from rayrl.runs.stage_metrics import LedgerCounts
from rayrl.runs.stage_table import Purpose

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_DRAIN_S = 3.0
"""For calls under way when a run ends early."""
_SHOW_AFTER_S = 0.2
"""Time after which a change of the load is exported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[Question]):
    """What became of a question that was put to the oracle."""

    answer: Question | None
    """None: the budget does not allow it."""
    attempt: int | None = None
    """The call in the ledger; None if none was made, since the answer was known or the budget is gone."""
    is_readable: bool = True
    """False: the call gave no answer, or one that nobody can read."""
    is_refunded: bool = False
    """Whether the call cost nothing."""


class OraclePool:
    """Judges and compares responses: each question once, within the budget, with limited concurrency.

    Args:
        config: which oracle.
        rubric: what it is asked.
        ledger: path or fsspec URL of the ledger.
        budgets: how many queries each purpose may pay for.
        run: id of the run, to which the budgets belong.
    """

    def __init__(
        self, config: OracleBase, rubric: Rubric, ledger: str, budgets: Mapping[str, int], run: str = ""
    ) -> None:
        prices = config.prices()
        budget_usd = prices.budget_usd if prices else None
        self._rubric = rubric
        self._oracle = build_oracle(config, rubric)
        self._ledger = Ledger(ledger, budgets, run=run, is_own=config.ledger is None, budget_usd=budget_usd)
        people = config.people_asked()
        self._has_judge = config is not people
        self._people = None
        if people is not None:
            desk = build_desk(people, rubric, "oracle.people" if self._has_judge else "oracle")
            self._people = People(desk, people, self._ledger, is_only=not self._has_judge)
        self._people_above = config.people_above if isinstance(config, PanelOracleConfig) else 0.0
        self._breaker = Breaker(config.max_unreadable)
        self._call_timeout_s = config.longest_call_s()
        self._slots = Slots(config.max_concurrency)
        self._max_concurrency = config.max_concurrency
        # Questions that wait or are asked, by key. A task ends with the answer, or with None if the budget is gone.
        self._asking: dict[str, asyncio.Task[Judgement | Comparison | None]] = {}
        # Questions that got no answer, and cost nothing: they are asked once more.
        self._unanswered: set[str] = set()
        self._stage = ""
        self._num_calls = 0
        self._settled = asyncio.Event()
        self._showing: asyncio.TimerHandle | None = None
        logger.info("oracle: %s, at most %d calls at once", config.label(), config.max_concurrency)
        meters.show_budget(budgets, budget_usd)
        self._show_load()

    async def judge(
        self, judgements: Sequence[Judgement], purpose: Purpose, stage: str = "", *, by_people: bool = True
    ) -> list[Judgement]:
        """Answer judgements, in order; items that fail and questions beyond the budget are abstentions.

        Args:
            judgements: of the status "asked".
            purpose: the budget that pays.
            stage: the stage that asks, for the ledger.
            by_people: whether people answer too, who are asked about all of a stage at once. False has judges alone
                answer, in parts, before that call.

        Raises:
            WaitingForPeople: people have not answered enough of it yet.
            JudgeFailed: the oracle itself fails; what it had answered is in the ledger.
            UsdExhausted: the budget in USD is used up before all labels are asked for.
        """
        return await self._answers(judgements, purpose, stage, by_people=by_people)

    async def compare(
        self, comparisons: Sequence[Comparison], purpose: Purpose, stage: str = "", *, by_people: bool = True
    ) -> list[Comparison]:
        """Answer comparisons, as `judge` does. Each is one query of the purpose's budget, in the order given."""
        return await self._answers(comparisons, purpose, stage, by_people=by_people)

    async def try_out(self, questions: Sequence[Question]) -> str:
        """Ask one of a few questions, alone and before anything else; the next one only if the first is unreadable.

        It goes the whole way: rubric, endpoint, model, parser. It is paid, and counted under the purpose "test". One
        that this run, or another one with the same ledger, has asked is not asked again.

        Returns:
            What came back and what it cost, for humans.

        Raises:
            JudgeFailed: the oracle fails, or its answers cannot be read.
        """
        reasons: list[str] = []
        for question in questions:
            outcome = await self._attempts(address(question, self._oracle, self._rubric, "test"), "test")
            if outcome.answer is None:
                return "not asked: the budget of this run's test questions is spent"
            if outcome.attempt is None or outcome.is_readable:
                return _told(outcome.answer)
            # It may be asked again: the judge may be mended without a change to the config.
            self._ledger.lose(outcome.attempt)
            await self._ledger.keep()
            reasons.append(outcome.answer.rationale)
        raise JudgeFailed(
            f"the oracle failed the test: none of {len(questions)} answers could be read "
            f"({'; '.join(dict.fromkeys(reasons))}). Mend the judge, oracle or rubric, and run the same command again"
        )

    def summary(self) -> dict[str, LedgerCounts]:
        """`Ledger.summary`."""
        return self._ledger.summary()

    def num_spent(self, keys: Sequence[str], purpose: Purpose) -> int:
        """`Ledger.num_spent`."""
        return self._ledger.num_spent(keys, purpose)

    def outlook(self, questions: Sequence[Question], purpose: Purpose, stage: str) -> Outlook:
        """`Ledger.outlook`, of questions that are to be asked."""
        addressed = [address(each, self._oracle, self._rubric, purpose) for each in questions]
        return replace(self._ledger.outlook(addressed, purpose, stage), is_whole=self._people is not None)

    def waiting(self) -> Waiting | None:
        """Return the questions that people have not answered yet; None if nothing is missing."""
        return None if self._people is None else self._people.waiting

    def resize(self, least: int | None, most: int | None) -> FleetState:
        """Ask so many questions at once from now on: `most`, or if that is None the number of the config.

        The threads of a scripted oracle stay as many as its config asks for.
        """
        self._slots.resize(self._max_concurrency if most is None else most)
        return self.state()

    def state(self) -> FleetState:
        """Describe the pool as if it were a fleet: its slots are the replicas that are ready."""
        return FleetState(
            name="oracle",
            ready=self._slots.num,
            starting=0,
            draining=max(0, self._slots.num_used - self._slots.num),
            calls=self._slots.num_used,
            waiting=self._slots.num_waiting,
            least=1,
            most=self._slots.num,
            needs="0 GPU, 0 CPU",
            failure=None,
            has_given_up=False,
        )

    def stop_asking(self) -> None:
        """Ask nothing more; calls under way go on."""
        self._breaker.stop("the run is ending")

    async def drain(self, wait_s: float) -> None:
        """Ask nothing more, wait a moment for the calls under way, and close the ledger, which then is one file."""
        self.stop_asking()
        await self._idle(wait_s)
        self.close()

    def close(self) -> None:
        """Give up the ledger, for another owner in the same process."""
        self._ledger.close()

    async def _answers(
        self, asked: Sequence[Question], purpose: Purpose, stage: str, *, by_people: bool
    ) -> list[Question]:
        start = time.monotonic()
        if self._people is not None and not self._has_judge:
            if not by_people:
                return list(asked)
            questions = [address(each, self._people.desk, self._rubric, purpose) for each in asked]
            return await self._people.answers(questions, purpose, stage)
        if stage != self._stage:  # unreadable answers of a stage that has ended are what they are
            self._stage = stage
            self._breaker.read()
        questions = [address(each, self._oracle, self._rubric, purpose) for each in asked]
        answers = await self._answer_all(questions, stage)
        if unanswered := [place for place, question in enumerate(questions) if question.key in self._unanswered]:
            # What ailed the judge may have passed meanwhile.
            again = await self._answer_all([questions[place] for place in unanswered], stage)
            for place, answer in zip(unanswered, again, strict=True):
                answers[place] = answer
                self._unanswered.discard(answer.key)
        await self._ledger.sync()
        if self._people is not None and by_people:
            answers = await self._settled_by_people(self._people, asked, answers, stage)
        num_scored = sum(answer.status == "scored" for answer in answers)
        logger.info(
            "asked %d questions for %s: %d answered, %d abstained, %.1f s",
            len(answers),
            purpose,
            num_scored,
            len(answers) - num_scored,
            time.monotonic() - start,
        )
        return answers

    async def _settled_by_people(
        self, people: People, asked: Sequence[Question], answers: Sequence[Question], stage: str
    ) -> list[Question]:
        """Replace the judges' answers that are in doubt by those of people, where they give one.

        Raises:
            WaitingForPeople: they have not answered yet. The judges' answers are in the ledger.
        """
        disagreements = self._ledger.disagreements(answer.key for answer in answers)
        doubts = [_doubt(answer, disagreements.get(answer.key)) for answer in answers]
        places = in_doubt(doubts, self._people_above)
        questions = [address(asked[place], people.desk, self._rubric, "people") for place in places]
        settled = list(answers)
        for place, answer in zip(places, await people.answers(questions, "people", stage), strict=True):
            if answer.status == "scored":
                settled[place] = settled_by(answers[place], answer)
        return settled

    async def _answer_all(self, questions: Sequence[Question], stage: str) -> list[Question]:
        """Answer questions side by side.

        Raises:
            JudgeFailed: the oracle failed; no call is under way any more.
        """
        tasks = [asyncio.create_task(self._answer(question, stage)) for question in questions]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if failure := next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None):
            # The run ends now. What is being paid for is kept first.
            await self._idle(self._call_timeout_s)
            if not isinstance(failure, RayRLError):  # the breaker tells it in words
                self._breaker.refuse_if_stopped()
            raise failure
        # The last ones may have stopped the asking, with nothing left to ask.
        await self._breaker.pass_through()
        return [task.result() for task in tasks]

    async def _idle(self, wait_s: float) -> None:
        """Wait until no call is under way, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._num_calls:
                    await self._settled.wait()

    async def _answer(self, question: Question, stage: str) -> Question:
        """Ask, or share the answer to an equal question that is being asked already."""
        # A loop, since the other caller may have been refused under its own purpose's budget, and a third may have
        # begun to ask meanwhile.
        while (other := self._asking.get(question.key)) is not None:
            paid = await asyncio.shield(other)
            if paid is not None:
                meters.REUSED.add(purpose=question.purpose)
                return reused(question, paid)
        # A task of its own: a caller that goes away must not cancel a call that is being paid for.
        task = asyncio.create_task(self._ask(question, stage))
        self._asking[question.key] = task
        task.add_done_callback(lambda _: self._asked(question.key))
        answer = await asyncio.shield(task)
        return refused(question, BUDGET_EXHAUSTED) if answer is None else answer

    async def _ask(self, question: Question, stage: str) -> Question | None:
        """Ask under the limits; None if the budget does not allow it."""
        async with self._slots:
            await self._breaker.pass_through()
            outcome = await self._attempts(question, stage)
        self._note(question.key, outcome)
        return outcome.answer

    async def _attempts(self, question: Question, stage: str) -> Outcome[Question]:
        """Attempt a question until it is answered, as far as the judge comes back when it fails.

        Raises:
            JudgeFailed: the judge does not come back.
        """
        is_probe = False
        try:
            while True:
                reserved = await self._reserve(question, stage)
                if reserved is None:
                    return Outcome(answer=None)
                if not isinstance(reserved, Reserved):
                    meters.REUSED.add(purpose=question.purpose)
                    return Outcome(answer=reserved)
                answer, verdict = await self._pay(reserved)
                if verdict.failure is None or not verdict.is_refunded:
                    if verdict.failure is not None:
                        await self._stop(reserved, verdict)
                    return Outcome(
                        answer=answer,
                        attempt=reserved.attempt,
                        is_readable=verdict.is_readable,
                        is_refunded=verdict.is_refunded,
                    )
                is_probe = await self._breaker.failed(verdict.failure, is_probe=is_probe)
                if not is_probe:
                    await self._breaker.pass_through()
        finally:
            if is_probe:
                self._breaker.probed()

    async def _stop(self, reserved: Reserved[Question], verdict: Verdict) -> None:
        """Ask nothing more after a call that was paid for, and was the judge's last."""
        assert verdict.failure is not None
        self._breaker.stop(verdict.failure)
        if verdict.score is None:  # it has no answer: asked again once the judge is mended
            self._ledger.lose(reserved.attempt)
            await self._ledger.keep()

    async def _pay(self, reserved: Reserved[Question]) -> tuple[Question, Verdict]:
        """Call the oracle and commit what it says."""
        question = reserved.question
        is_settled = False
        self._num_calls += 1
        self._show_load()
        started = time.monotonic()
        try:
            # The reservation must be durable before the call: otherwise a crash could pay for it twice.
            await self._ledger.sync()
            self._breaker.refuse_if_stopped()
            verdict = await call(question, self._oracle)
            answer = self._ledger.commit(reserved, verdict)
            is_settled = True
            kind = "judgement" if isinstance(answer, Judgement) else "comparison"
            meters.JUDGEMENTS.add(purpose=question.purpose, kind=kind, outcome=answer.status)
        except JudgeFailed:  # before the call
            answer = self._ledger.commit(reserved, Verdict(score=None, rationale="not asked", billed=False))
            is_settled = True
            raise
        except RayRLError as error:  # the ledger cannot be written
            is_settled = True
            self._breaker.stop(str(error))
            raise
        except Exception as error:
            logger.exception("the oracle raised on %r", question.key)
            self._breaker.stop(f"{self._oracle.name} raised {type(error).__name__}: {error}; its log has the traceback")
            raise
        finally:
            if not is_settled:  # the call may have been made, and may have cost money
                self._ledger.lose(reserved.attempt)
            self._num_calls -= 1
            # Wakes all that wait for the budget, and is replaced for those that wait from now on.
            self._settled.set()
            self._settled = asyncio.Event()
            meters.ORACLE_SECONDS.add(time.monotonic() - started, purpose=question.purpose)
        await self._ledger.keep()
        return answer, verdict

    def _note(self, key: str, outcome: Outcome[Question]) -> None:
        """Let the breaker count answers that nobody can read; too many in a row are a failed judge's."""
        if outcome.attempt is None:
            return  # it tells nothing about the judge
        if outcome.is_readable:
            self._breaker.read()
            return
        if outcome.is_refunded:
            self._unanswered.add(key)
        if in_a_row := self._breaker.unreadable(outcome.attempt):
            # Those answers teach nothing about their items: they are asked again once the judge is mended.
            self._ledger.lose(*in_a_row)
            self._ledger.flush()
            reason = outcome.answer.rationale if outcome.answer else ""
            self._breaker.stop(
                f"{len(in_a_row)} answers in a row could not be read (oracle.max_unreadable), the last one because: "
                f"{reason}"
            )

    def _asked(self, key: str) -> None:
        self._asking.pop(key)
        self._show_load()

    def _show_load(self) -> None:
        """Export the load: at once when nothing is asked, else soon, for all changes until then together."""
        if not self._asking:
            self._export_load()
        elif self._showing is None:
            self._showing = asyncio.get_running_loop().call_later(_SHOW_AFTER_S, self._export_load)

    def _export_load(self) -> None:
        if self._showing is not None:
            self._showing.cancel()
            self._showing = None
        meters.ORACLE_IN_FLIGHT.set(self._num_calls)
        meters.ORACLE_WAITING.set(len(self._asking) - self._num_calls)
        meters.show_spending(*self._ledger.spending())

    async def _reserve(self, question: Question, stage: str) -> Reserved[Question] | Question | None:
        """Reserve a call, or find the answer in the ledger; None if the budget is gone.

        Waits while calls under way may still give back some of the budget they hold.

        Raises:
            UsdExhausted: a label cannot be paid. Half of the labels is another science than was planned, whereas an
                evaluation by fewer questions is the same one, with a larger error.
        """
        estimated_usd = estimate_usd(question, self._oracle)
        while True:
            # Taken before the attempt, so that a call that settles during it is not missed.
            settled = self._settled
            try:
                return self._ledger.reserve(question, estimated_usd, stage=stage)
            except BudgetExhausted as error:
                if self._num_calls == 0:
                    if isinstance(error, UsdExhausted) and question.purpose == "label":
                        raise
                    logger.info("not asked: %s", error)
                    return None
            await settled.wait()
            self._breaker.refuse_if_stopped()


def _doubt(answer: Judgement | Comparison, disagreement: float | None) -> float:
    """Return how much judges doubt an answer of theirs: without bound where they abstain, not at all if not asked."""
    if answer.status == "abstained":
        return 0.0 if answer.rationale == BUDGET_EXHAUSTED else math.inf
    return disagreement or 0.0


def _told(answer: Judgement | Comparison) -> str:
    """Write an answer to a test question in one line."""
    if answer.status == "abstained":
        said = f"abstained ({answer.rationale})"
    elif isinstance(answer, Judgement):
        said = f"score {answer.score:g}"
    else:
        said = f"prefers {answer.preference}"
    return f"{said}, {'unpriced' if answer.cost_usd is None else f'{answer.cost_usd:.4f} USD'}"


def start_oracle_pool(
    run_name: str, config: OracleBase, *, rubric: Rubric, ledger: str, budgets: Mapping[str, int], run: str = ""
) -> ActorHandle[OraclePool]:
    """Check the oracle, then start the run's one pool as the actor `<run name>-oracle` on the driver's node.

    The driver's node is where a local ledger lies and where the API key was checked. A killed pool restarts
    by itself and repeats the calls it was in; at most those are paid twice, and they are counted.

    Args:
        run_name: names the actor.
        config: which oracle.
        rubric: what it is asked.
        ledger: path or fsspec URL.
        budgets: queries that each purpose may pay for.
        run: id of the run, to which the budgets belong.

    Raises:
        ConfigError: the oracle is unreachable, or its key, function or table unusable.
        RunDirectoryError: another live run has this name or owns the ledger.
        StageTimeout: the actor did not start.
    """
    check_oracle(config, rubric)
    options = {
        "name": f"{run_name}-oracle",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    try:
        # Any, since the types of Ray know neither the actor's methods nor that this is a handle.
        pool: Any = ray.remote(OraclePool).options(**options).remote(config, rubric, ledger, dict(budgets), run)
    except ValueError:
        raise RunDirectoryError(
            f"name must be unique in the cluster: a run {run_name!r} is alive; end it, or choose another name"
        ) from None
    try:
        ray.get(pool.summary.remote(), timeout=_START_TIMEOUT_S)
    except ActorDiedError as error:
        reason = str(error).strip().rpartition("\n")[2]  # the rest is the actor's traceback
        raise RunDirectoryError(f"the oracle pool of run {run_name!r} did not start: {reason}") from None
    except GetTimeoutError:
        raise StageTimeout(f"waited {_START_TIMEOUT_S:g} s for the oracle pool of run {run_name!r} to start") from None
    return pool


def stop_asking(pool: ActorHandle[OraclePool]) -> None:
    """Keep the pool from asking anything more, from now on; returns at once."""
    stopped: Any = pool.stop_asking
    stopped.remote()


def end_oracle_pool(pool: ActorHandle[OraclePool]) -> None:
    """End the pool. Calls under way get a moment to be kept; those that take longer are lost, and counted."""
    ended: Any = pool.drain.remote(_DRAIN_S)
    with contextlib.suppress(GetTimeoutError, RayActorError):
        ray.get(ended, timeout=2 * _DRAIN_S)
    ray.kill(pool)  # pyright: ignore[reportUnknownMemberType] Ray leaves the type of its handles open
