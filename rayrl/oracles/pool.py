"""Oracle pool: the one named actor that asks the oracle, and owns the ledger, the connections and the global limits.

`OraclePool` is a plain class and runs without Ray. A restarted actor opens the ledger again and goes on: paid
questions are answered from there, so that a caller may simply repeat its call. The pool does not choose what is asked,
and it does not retry a failed call; the oracle's implementation does that.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.config import OracleBase
from rayrl.errors import BudgetExhausted, RunDirectoryError, StageTimeout
from rayrl.metrics import meters
from rayrl.metrics.fleet_state import FleetState
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.ledger import Ledger, Reserved
from rayrl.oracles.limits import Slots
from rayrl.oracles.questions import Question, address, call, estimate_usd, refused, reused
from rayrl.records import Comparison, Judgement
from rayrl.runs.stage_metrics import LedgerCounts
from rayrl.runs.stage_table import Purpose

logger = logging.getLogger(__name__)

BUDGET_EXHAUSTED = "budget exhausted"
"""Rationale of an abstention that was never asked, because nothing was left to pay with."""

_START_TIMEOUT_S = 120.0


class OraclePool:
    """Judges and compares responses: each question once, within the budget, with limited concurrency.

    Args:
        config: which oracle.
        rubric: what it is asked.
        ledger: path or fsspec URL of the ledger.
        budgets: how many queries each purpose may pay for.
    """

    def __init__(self, config: OracleBase, rubric: Rubric, ledger: str, budgets: Mapping[str, int]) -> None:
        prices = config.prices()
        budget_usd = prices.budget_usd if prices else None
        self._rubric = rubric
        self._oracle = build_oracle(config, rubric)
        self._ledger = Ledger(ledger, budgets, budget_usd=budget_usd)
        self._slots = Slots(config.max_concurrency)
        self._max_concurrency = config.max_concurrency
        # Questions that wait or are asked, by key. A task ends with the answer, or with None if the budget is gone.
        self._asking: dict[str, asyncio.Task[Judgement | Comparison | None]] = {}
        self._num_calls = 0
        self._settled = asyncio.Event()
        logger.info("oracle: %s, at most %d calls at once", config.label(), config.max_concurrency)
        meters.show_budget(budgets, budget_usd)
        self._show_load()

    async def judge(self, judgements: Sequence[Judgement], purpose: Purpose) -> list[Judgement]:
        """Answer judgements, in order; failures and questions that the budget does not cover are abstentions."""
        questions = [address(each, self._oracle, self._rubric, purpose) for each in judgements]
        return await self._answers(questions, purpose)

    async def compare(self, comparisons: Sequence[Comparison], purpose: Purpose) -> list[Comparison]:
        """Answer comparisons, in order. Each is one query of the purpose's budget, in the order given."""
        questions = [address(each, self._oracle, self._rubric, purpose) for each in comparisons]
        return await self._answers(questions, purpose)

    def summary(self) -> dict[str, LedgerCounts]:
        """`Ledger.summary`."""
        return self._ledger.summary()

    def num_spent(self, keys: Sequence[str], purpose: Purpose) -> int:
        """`Ledger.num_spent`."""
        return self._ledger.num_spent(keys, purpose)

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

    def close(self) -> None:
        """Give up the ledger, for another owner in the same process."""
        self._ledger.close()

    async def _answers(self, questions: Sequence[Question], purpose: Purpose) -> list[Question]:
        start = time.monotonic()
        answers = await asyncio.gather(*(self._answer(question) for question in questions))
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

    async def _answer(self, question: Question) -> Question:
        """Ask, or share the answer to an equal question that is being asked already."""
        # A loop, since the other caller may have been refused under its own purpose's budget, and a third may have
        # begun to ask meanwhile.
        while (other := self._asking.get(question.key)) is not None:
            paid = await asyncio.shield(other)
            if paid is not None:
                meters.REUSED.add(purpose=question.purpose)
                return reused(question, paid)
        # A task of its own: a caller that goes away must not cancel a call that is being paid for.
        task = asyncio.create_task(self._ask(question))
        self._asking[question.key] = task
        task.add_done_callback(lambda _: self._asked(question.key))
        answer = await asyncio.shield(task)
        return refused(question, BUDGET_EXHAUSTED) if answer is None else answer

    async def _ask(self, question: Question) -> Question | None:
        """Reserve, call, commit; None if the budget does not allow it."""
        async with self._slots:
            reserved = await self._reserve(question)
            if reserved is None:
                return None
            if not isinstance(reserved, Reserved):
                meters.REUSED.add(purpose=question.purpose)
                return reserved
            self._num_calls += 1
            self._show_load()
            started = time.monotonic()
            answer = None
            try:
                # The reservation must be durable before the call: otherwise a crash could pay for it twice.
                await self._ledger.sync()
                answer = self._ledger.commit(reserved, await call(question, self._oracle))
                kind = "judgement" if isinstance(answer, Judgement) else "comparison"
                meters.JUDGEMENTS.add(purpose=question.purpose, kind=kind, outcome=answer.status)
            finally:
                if answer is None:  # the call may have been made, and may have cost money
                    self._ledger.lose(reserved)
                self._num_calls -= 1
                # Wakes all that wait for the budget, and is replaced for those that wait from now on.
                self._settled.set()
                self._settled = asyncio.Event()
                meters.ORACLE_SECONDS.add(time.monotonic() - started, purpose=question.purpose)
        await self._ledger.sync()
        return answer

    def _asked(self, key: str) -> None:
        self._asking.pop(key)
        self._show_load()

    def _show_load(self) -> None:
        meters.ORACLE_IN_FLIGHT.set(self._num_calls)
        meters.ORACLE_WAITING.set(len(self._asking) - self._num_calls)
        meters.show_spending(*self._ledger.spending())

    async def _reserve(self, question: Question) -> Reserved[Question] | Question | None:
        """Reserve a call, or find the answer in the ledger; None if the budget is gone.

        Waits while calls under way may still give back some of the budget they hold.
        """
        estimated_usd = estimate_usd(question, self._oracle)
        while True:
            # Taken before the attempt, so that a call that settles during it is not missed.
            settled = self._settled
            try:
                return self._ledger.reserve(question, estimated_usd)
            except BudgetExhausted as error:
                if self._num_calls == 0:
                    logger.info("not asked: %s", error)
                    return None
            await settled.wait()


def start_oracle_pool(
    run_name: str, config: OracleBase, *, rubric: Rubric, ledger: str, budgets: Mapping[str, int]
) -> ActorHandle[OraclePool]:
    """Check the oracle, then start the run's one pool as the actor `<run name>-oracle` on the driver's node.

    The driver's node is where a local ledger lies and where the API key was checked. A killed pool restarts
    by itself and repeats the calls it was in; at most those are paid twice, and they are counted.

    Raises:
        ConfigError: the oracle is unreachable, or its key, function or table unusable.
        RunDirectoryError: another live run has this name or owns the ledger.
        StageTimeout: the actor did not start.
    """
    build_oracle(config, rubric).check()
    options = {
        "name": f"{run_name}-oracle",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    try:
        # Any, since the types of Ray know neither the actor's methods nor that this is a handle.
        pool: Any = ray.remote(OraclePool).options(**options).remote(config, rubric, ledger, dict(budgets))
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
