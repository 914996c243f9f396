"""The one named actor that talks to the expert: it owns the ledger, the connections and the global limits.

`OraclePool` is a plain class and runs without Ray. A restarted actor opens the ledger again and goes on:
what was paid is answered from there, so that a caller may simply repeat its call.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.config import HttpOracleConfig, OracleConfig
from rayrl.errors import BudgetExhausted, RunDirectoryError, StageTimeout
from rayrl.metrics import meters
from rayrl.metrics.fleet_state import FleetState
from rayrl.models.judge_prompt import Rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.oracles.build import build_oracle
from rayrl.oracles.ledger import Ledger, Reserved
from rayrl.oracles.limits import Slots
from rayrl.oracles.queries import Outcome, PairQuery, Query, Question
from rayrl.records import Comparison, Judgement

logger = logging.getLogger(__name__)

BUDGET_EXHAUSTED = "budget exhausted"
"""Rationale of an abstention that was never asked, because nothing was left to pay with."""

_START_TIMEOUT_S = 120.0

A = TypeVar("A", Judgement, Comparison)


class Item(TypedDict):
    """One response to judge."""

    prompt_id: str
    response_id: str
    prompt: str
    response: str


class PairItem(TypedDict):
    """Two responses to compare, in this order."""

    prompt_id: str
    first_id: str
    second_id: str
    prompt: str
    first: str
    second: str


class OraclePool:
    """Judges and compares responses: each question once, within the budget, with limited concurrency.

    Args:
        config: which expert.
        rubric: what it is asked.
        ledger: path or fsspec URL of the ledger.
        budgets: how many queries each purpose may pay for.
    """

    def __init__(self, config: OracleConfig, rubric: Rubric, ledger: str, budgets: Mapping[str, int]) -> None:
        budget_usd = config.budget_usd if isinstance(config, HttpOracleConfig) else None
        self._rubric = rubric
        self._oracle = build_oracle(config, rubric)
        self._ledger = Ledger(ledger, budgets, budget_usd=budget_usd)
        self._slots = Slots(config.max_concurrency)
        self._max_concurrency = config.max_concurrency
        self._asking: dict[str, asyncio.Task[Judgement | Comparison | None]] = {}
        self._num_calls = 0
        self._settled = asyncio.Event()
        meters.show_budget(budgets, budget_usd)
        self._show_load()

    async def judge(self, items: Sequence[Item], purpose: str) -> list[Judgement]:
        """One judgement per item, in order; failures and what the budget does not cover are abstentions."""
        name, rubric = self._oracle.name, self._rubric.version
        return await self._answers([Query(**item, oracle=name, rubric=rubric) for item in items], purpose)

    async def compare(self, items: Sequence[PairItem], purpose: str) -> list[Comparison]:
        """One comparison per item, in order. Each is one query of the purpose's budget, in the order given."""
        name, rubric = self._oracle.comparer, pairwise_version(self._rubric)
        return await self._answers([PairQuery(**item, oracle=name, rubric=rubric) for item in items], purpose)

    def summary(self) -> dict[str, dict[str, float]]:
        """`Ledger.summary`."""
        return self._ledger.summary()

    def num_spent(self, keys: Sequence[str], purpose: str) -> int:
        """`Ledger.num_spent`."""
        return self._ledger.num_spent(keys, purpose)

    def judgements(self, purpose: str) -> list[Judgement]:
        """`Ledger.judgements`."""
        return self._ledger.judgements(purpose)

    def comparisons(self, purpose: str) -> list[Comparison]:
        """`Ledger.comparisons`."""
        return self._ledger.comparisons(purpose)

    def resize(self, least: int | None, most: int | None) -> FleetState:
        """Ask so many questions at once from now on: `most`, or if that is None what the config says.

        A scripted expert has as many threads as its config says, whatever is asked of it.
        """
        self._slots.resize(self._max_concurrency if most is None else most)
        return self.state()

    def state(self) -> FleetState:
        """Questions asked and waiting, in the words of a fleet: what is ready are slots."""
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

    async def _answers(self, queries: Sequence[Question[A]], purpose: str) -> list[A]:
        start = time.monotonic()
        answers = await asyncio.gather(*(self._answer(query, purpose) for query in queries))
        num_scored = sum(answer.status == "scored" for answer in answers)
        logger.info(
            "asked %d questions for %s: %d answered, %d abstained, %.1f s",
            *(len(answers), purpose, num_scored, len(answers) - num_scored, time.monotonic() - start),
        )
        return answers

    async def _answer(self, query: Question[A], purpose: str) -> A:
        """Ask, or share the answer to the same question when somebody is asking it already."""
        while (other := self._asking.get(query.key)) is not None:
            shared = await asyncio.shield(other)
            if shared is not None:
                meters.REUSED.add(purpose=purpose)
                return replace(shared, **query.ids(), purpose=purpose, cost_usd=0.0)  # type: ignore[return-value]
        # A task of its own: a caller that goes away must not cancel a call that is being paid for.
        task = asyncio.create_task(self._ask(query, purpose))
        self._asking[query.key] = task
        task.add_done_callback(lambda _: self._asked(query.key))
        return await asyncio.shield(task) or _refused(query, purpose)

    async def _ask(self, query: Question[A], purpose: str) -> A | None:
        """Reserve, call, commit; None if the budget does not allow it."""
        async with self._slots:
            claim = await self._reserve(query, purpose)
            if not isinstance(claim, Reserved):
                meters.REUSED.add(claim is not None, purpose=purpose)
                return claim
            self._num_calls += 1
            self._show_load()
            started = time.monotonic()
            answer = None
            try:
                await self._ledger.sync()
                answer = self._ledger.commit(claim, await query.put_to(self._oracle))
                kind = "judgement" if isinstance(answer, Judgement) else "comparison"
                meters.JUDGEMENTS.add(purpose=purpose, kind=kind, outcome=answer.status)
            finally:
                if answer is None:  # nobody knows what the call did, or whether it was made
                    self._ledger.lose(claim)
                self._num_calls -= 1
                self._settled.set()
                self._settled = asyncio.Event()
                meters.ORACLE_SECONDS.add(time.monotonic() - started, purpose=purpose)
        await self._ledger.sync()
        return answer

    def _asked(self, key: str) -> None:
        self._asking.pop(key)
        self._show_load()

    def _show_load(self) -> None:
        meters.ORACLE_IN_FLIGHT.set(self._num_calls)
        meters.ORACLE_WAITING.set(len(self._asking) - self._num_calls)
        meters.show_spending(*self._ledger.spending())

    async def _reserve(self, query: Question[A], purpose: str) -> Reserved[A] | A | None:
        """A reservation; waits while calls under way may still give back some of the budget they hold."""
        estimated_usd = query.estimate_usd(self._oracle)
        while True:
            settled = self._settled
            try:
                return self._ledger.reserve(query, purpose, estimated_usd)
            except BudgetExhausted as error:
                if self._num_calls == 0:
                    logger.info("not asked: %s", error)
                    return None
            await settled.wait()


def _refused(query: Question[A], purpose: str) -> A:
    unpaid = Outcome(
        key=query.key, status="abstained", score=None, rationale=BUDGET_EXHAUSTED, purpose=purpose, cost_usd=0.0
    )
    return query.answered(unpaid)


def start_oracle_pool(
    run_name: str, config: OracleConfig, *, rubric: Rubric, ledger: str, budgets: Mapping[str, int]
) -> Any:
    """Check the expert, then start the run's one pool as the actor `<run name>-oracle` on the driver's node.

    The driver's node is where a local ledger lies and where the API key was checked. A killed pool restarts
    by itself and repeats the calls it was in; at most those are paid twice, and they are counted.

    Raises:
        ConfigError: the expert is unreachable, or its key, function or table unusable.
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
        pool = ray.remote(OraclePool).options(**options).remote(config, rubric, ledger, dict(budgets))
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
