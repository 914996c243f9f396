"""The ledger of paid judgements: reserve before a call, commit after it, in a SQLite file.

An attempt is `reserved` (a call is under way), then `scored` or `abstained` (paid and final), `refunded`
(it cost nothing) or `lost` (the process died during the call: the money may be gone). All but refunds count
against the budget. A judgement or comparison is keyed by what was asked of whom, not by purpose: paid once, it is
free ever after.

One process owns a ledger at a time. With a remote location (any fsspec URL) the remote file is the truth:
this process works on a copy, and `sync` uploads it, which must be awaited between a reservation and its
call.
"""

import asyncio
import contextlib
import json
import logging
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rayrl.errors import BudgetExhausted, RunDirectoryError
from rayrl.oracles import ledger_schema as sql
from rayrl.oracles.ledger_file import is_remote, own, working_copy
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.queries import Outcome, PairQuery, Query, Question, comparison, judgement
from rayrl.records import Comparison, Judgement
from rayrl.runs import storage

__all__ = ["Ledger", "PairQuery", "Query", "Reserved"]

logger = logging.getLogger(__name__)

A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(Generic[A]):
    """The right to make one call. Ends in `commit`, `release` or `lose`."""

    attempt: int
    query: Question[A]
    purpose: str
    estimated_usd: float


class Ledger:
    """The durable account of one run. Methods are atomic, and safe to call from several threads.

    Args:
        location: a local path, or an fsspec URL.
        budgets: how many attempts each purpose may pay for.
        budget_usd: hard limit over all purposes; needs an honest upper bound with every reservation.
        owner_wait_s: how long a restarted owner waits for its killed predecessor to be gone.

    Raises:
        RunDirectoryError: the file is no ledger, or another live process owns it.
    """

    def __init__(
        self,
        location: str,
        budgets: Mapping[str, int],
        *,
        budget_usd: float | None = None,
        owner_wait_s: float = 30.0,
    ) -> None:
        self._budgets = dict(budgets)
        self._budget_usd = budget_usd
        self._remote = location if is_remote(location) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="rayrl-ledger-") if self._remote else None
        path = working_copy(location, self._scratch.name) if self._scratch else Path(location)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._owner = own(path, owner_wait_s)
        self._lock = threading.RLock()
        self._uploading = asyncio.Lock()
        self._num_writes = self._num_uploaded = 0
        try:
            self._db = sql.connect(path)
            lost = self._db.execute("UPDATE attempts SET state = 'lost' WHERE state = 'reserved'").rowcount
            spent = self._db.execute(sql.SPENT).fetchall()
        except sqlite3.DatabaseError as error:
            raise RunDirectoryError(f"{location} is not a usable ledger: {error}") from None
        self._num_spent = {purpose: count for purpose, count, _ in spent}
        self._spent_usd = sum(usd for _, _, usd in spent)
        if lost:
            logger.warning("%d calls were under way when the last process died: counted as spent", lost)

    def reserve(self, query: Question[A], purpose: str, estimated_usd: float = 0.0) -> Reserved[A] | A:
        """The right to ask, or the answer if it was paid for already, under whatever purpose.

        Raises:
            BudgetExhausted: one more call could exceed the purpose's budget, or the budget in USD.
        """
        with self._transaction() as db:
            row = db.execute(sql.KNOWN, (query.key,)).fetchone()
            if row is not None and row["state"] != "reserved":
                return query.answered(_outcome(row, query, purpose))
            assert row is None, f"query {query.key} is already under way"
            self._refuse_overspending(purpose, estimated_usd)
            values = {"key": query.key, "purpose": purpose, "cost_usd": estimated_usd}
            attempt = db.execute(sql.RESERVE, query.columns() | values).lastrowid
            assert attempt is not None
            self._num_spent[purpose] = self._num_spent.get(purpose, 0) + 1
            self._spent_usd += estimated_usd
        return Reserved(attempt=attempt, query=query, purpose=purpose, estimated_usd=estimated_usd)

    def commit(self, reserved: Reserved[A], verdict: Verdict) -> A:
        """Keep what the call brought. An abstention that cost nothing gives its reservation back."""
        unscored = "abstained" if verdict.billed else "refunded"
        state = unscored if verdict.score is None else "scored"
        cost_usd = 0.0 if state == "refunded" else verdict.cost_usd
        answer = (
            state,
            verdict.score,
            verdict.rationale,
            cost_usd,
            verdict.input_tokens,
            verdict.output_tokens,
        )
        with self._transaction() as db:
            changed = db.execute(sql.SETTLE, (*answer, reserved.attempt)).rowcount
            assert changed == 1, f"attempt {reserved.attempt} is not reserved"
            row = db.execute("SELECT * FROM attempts WHERE attempt = ?", (reserved.attempt,)).fetchone()
        with self._lock:
            self._spent_usd += cost_usd - reserved.estimated_usd
            self._num_spent[reserved.purpose] -= state == "refunded"
        return reserved.query.answered(_outcome(row, reserved.query, reserved.purpose))

    def release(self, reserved: Reserved[A], reason: str) -> A:
        """Give a reservation back: the call was not made, or cost nothing. The same may be asked again."""
        return self.commit(reserved, Verdict(score=None, rationale=reason, billed=False))

    def lose(self, reserved: Reserved) -> None:
        """Give a call up whose outcome is unknown: it stays counted, and the same may be asked again."""
        with self._transaction() as db:
            db.execute("UPDATE attempts SET state = 'lost' WHERE attempt = ?", (reserved.attempt,))

    def judgements(self, purpose: str) -> list[Judgement]:
        """Every judgement paid for under a purpose, in the order it was asked; abstentions included."""
        with self._lock:
            return [judgement(row, _outcome(row)) for row in self._db.execute(sql.JUDGED, (purpose,))]

    def comparisons(self, purpose: str) -> list[Comparison]:
        """Every comparison paid for under a purpose, in the order it was asked; abstentions included."""
        with self._lock:
            return [comparison(row, _outcome(row)) for row in self._db.execute(sql.COMPARED, (purpose,))]

    def num_spent(self, keys: Iterable[str], purpose: str) -> int:
        """How much of a purpose's budget these questions took, with the calls that were lost on the way."""
        with self._lock:
            return self._db.execute(sql.SPENT_ON, (purpose, json.dumps(sorted(set(keys))))).fetchone()[0]

    def spending(self) -> tuple[dict[str, int], float]:
        """Queries per purpose and USD that are spent, or held for calls under way."""
        with self._lock:
            return dict(self._num_spent), self._spent_usd

    def summary(self) -> dict[str, dict[str, float]]:
        """Per purpose: budget, spent, scored, abstained, refunded, lost, in_flight (calls) and cost_usd.

        spent = scored + abstained + lost; what is in flight is held back from the budget too.
        """
        with self._lock:
            rows = self._db.execute(sql.SUMMARY).fetchall()
        purposes = [*self._budgets, *sorted({row["purpose"] for row in rows} - set(self._budgets))]
        summary: dict[str, dict[str, float]] = {}
        for purpose in purposes:
            counts = {state: count for name, state, count, _ in rows if name == purpose}
            summary[purpose] = {
                "budget": self._budgets.get(purpose, 0),
                "spent": sum(counts.get(state, 0) for state in ("scored", "abstained", "lost")),
                **{state: counts.get(state, 0) for state in ("scored", "abstained", "refunded", "lost")},
                "in_flight": counts.get("reserved", 0),
                "cost_usd": sum((usd for name, _, _, usd in rows if name == purpose), 0.0),
            }
        return summary

    async def sync(self) -> None:
        """Make everything written so far durable remotely; callers that come together share one upload."""
        if self._remote is None:
            return
        wanted = self._num_writes
        async with self._uploading:
            if self._num_uploaded >= wanted:
                return
            with self._lock:
                num_writes, snapshot = self._num_writes, self._db.serialize()
            await asyncio.to_thread(storage.write_bytes, self._remote, snapshot)
            self._num_uploaded = num_writes

    def close(self) -> None:
        """Give the file up. What is still reserved is lost when it is opened again."""
        with self._lock:
            self._db.close()
            self._owner.close()
            if self._scratch:
                self._scratch.cleanup()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._num_writes += 1

    def _refuse_overspending(self, purpose: str, estimated_usd: float) -> None:
        budget, spent = self._budgets.get(purpose, 0), self._num_spent.get(purpose, 0)
        if spent >= budget:
            raise BudgetExhausted(f"budget for {purpose} must cover every query: all {budget} are spent")
        # To the billionth of a dollar, so that 25 queries of 0.01 fit into 0.25 in floating point too.
        if self._budget_usd is not None and round(self._spent_usd + estimated_usd, 9) > self._budget_usd:
            raise BudgetExhausted(
                f"oracle.budget_usd must cover every query: {self._spent_usd:.4f} of {self._budget_usd:.4f} "
                f"are spent or held, and one more query may cost {estimated_usd:.4f}"
            )


def _outcome(row: sqlite3.Row, query: Question | None = None, purpose: str | None = None) -> Outcome:
    """A settled row, for whoever asks. The cost stays with the question it was paid for."""
    paid_here = query is None or (
        row["purpose"] == purpose and all(row[name] == value for name, value in query.columns().items())
    )
    return Outcome(
        key=row["key"],
        status="scored" if row["state"] == "scored" else "abstained",
        score=row["score"],
        rationale=row["rationale"],
        purpose=purpose or row["purpose"],
        cost_usd=row["cost_usd"] if paid_here else 0.0,
    )
