"""The one named actor that talks to the expert: it owns the ledger, the connections and the global limits.

`OraclePool` is a plain class and runs without Ray. A restarted actor opens the ledger again and goes on:
what was paid is answered from there, so that a caller may simply repeat its call.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.config import HttpOracleConfig, OracleConfig
from rayrl.errors import BudgetExhausted, RunDirectoryError, StageTimeout
from rayrl.models.judge import Rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.ledger import Ledger, Query, Reserved
from rayrl.records import Judgement

logger = logging.getLogger(__name__)

BUDGET_EXHAUSTED = "budget exhausted"
"""Rationale of an abstention that was never asked, because nothing was left to pay with."""

_START_TIMEOUT_S = 120.0


class Item(TypedDict):
    """One response to judge."""

    prompt_id: str
    response_id: str
    prompt: str
    response: str


class OraclePool:
    """Judges responses: each distinct one once, within the budget, with limited concurrency.

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
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._asking: dict[str, asyncio.Task[Judgement | None]] = {}
        self._num_calls = 0
        self._settled = asyncio.Event()

    async def judge(self, items: Sequence[Item], purpose: str) -> list[Judgement]:
        """One judgement per item, in order; failures and what the budget does not cover are abstentions."""
        start = time.monotonic()
        judgements = await asyncio.gather(*(self._judge(self._query(item), purpose) for item in items))
        num_scored = sum(judgement.status == "scored" for judgement in judgements)
        logger.info(
            "judged %d responses for %s: %d scored, %d abstained, %.1f s",
            *(len(judgements), purpose, num_scored, len(judgements) - num_scored, time.monotonic() - start),
        )
        return judgements

    def summary(self) -> dict[str, dict[str, float]]:
        """`Ledger.summary`."""
        return self._ledger.summary()

    def judgements(self, purpose: str) -> list[Judgement]:
        """`Ledger.judgements`."""
        return self._ledger.judgements(purpose)

    def close(self) -> None:
        """Give up the ledger, for another owner in the same process."""
        self._ledger.close()

    def _query(self, item: Item) -> Query:
        return Query(**item, oracle=self._oracle.name, rubric=self._rubric.version)

    async def _judge(self, query: Query, purpose: str) -> Judgement:
        """Ask, or share the answer to the same question when somebody is asking it already."""
        while (other := self._asking.get(query.key)) is not None:
            shared = await asyncio.shield(other)
            if shared is not None:
                addressed = {"prompt_id": query.prompt_id, "response_id": query.response_id}
                return replace(shared, **addressed, purpose=purpose, cost_usd=0.0)
        # A task of its own: a caller that goes away must not cancel a call that is being paid for.
        task = asyncio.create_task(self._ask(query, purpose))
        self._asking[query.key] = task
        task.add_done_callback(lambda _: self._asking.pop(query.key))
        return await asyncio.shield(task) or self._refused(query, purpose)

    async def _ask(self, query: Query, purpose: str) -> Judgement | None:
        """Reserve, call, commit; None if the budget does not allow it."""
        async with self._slots:
            claim = await self._reserve(query, purpose)
            if not isinstance(claim, Reserved):
                return claim
            self._num_calls += 1
            judgement = None
            try:
                await self._ledger.sync()
                verdict = await self._oracle.judge(query.prompt, query.response)
                judgement = self._ledger.commit(claim, verdict)
            finally:
                if judgement is None:  # nobody knows what the call did, or whether it was made
                    self._ledger.lose(claim)
                self._num_calls -= 1
                self._settled.set()
                self._settled = asyncio.Event()
        await self._ledger.sync()
        return judgement

    async def _reserve(self, query: Query, purpose: str) -> Reserved | Judgement | None:
        """A reservation; waits while calls under way may still give back some of the budget they hold."""
        estimated_usd = self._oracle.estimate_usd(query.prompt, query.response)
        while True:
            settled = self._settled
            try:
                return self._ledger.reserve(query, purpose, estimated_usd)
            except BudgetExhausted as error:
                if self._num_calls == 0:
                    logger.info("not asked: %s", error)
                    return None
            await settled.wait()

    def _refused(self, query: Query, purpose: str) -> Judgement:
        return Judgement(
            key=query.key,
            prompt_id=query.prompt_id,
            response_id=query.response_id,
            prompt=query.prompt,
            response=query.response,
            oracle=query.oracle,
            status="abstained",
            score=None,
            rationale=BUDGET_EXHAUSTED,
            purpose=purpose,
            cost_usd=0.0,
        )


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
