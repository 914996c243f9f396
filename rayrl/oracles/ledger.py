"""Ledger of paid questions: reserve before a call, commit after it, in a SQLite file.

An attempt is `reserved` (a call is under way), then `scored` or `abstained` (paid and final), `refunded` (it cost
nothing) or `lost` (the process died during the call, or the judge turned out to have failed: the money may be gone, and
the same may be asked again). All but refunds count against the budget. A judgement or comparison is keyed by its texts,
the oracle and the rubric, not by its run or purpose: paid once, it is free ever after.

What is written survives the process with the next `flush`, and the machine with the next `sync`, which must be awaited
between a reservation and its call. Many callers share one wait for the disk.

Several runs may use one ledger, one after another: each has budgets of its own, and takes over what the others paid
for. One process owns a ledger at a time. With a remote location (any fsspec URL) the remote file is the truth: this
process works on a copy, and `sync` uploads it. The ledger makes no calls and waits for no budget:
`rayrl.oracles.pool` does both.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import sqlite3
import tempfile
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

from rayrl.errors import BudgetExhausted, RunDirectoryError, UsdExhausted
from rayrl.oracles import ledger_schema as sql
from rayrl.oracles.ledger_file import is_remote, own, working_copy
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.questions import Question, answered, reused
from rayrl.records import Comparison, Judgement
from rayrl.runs import storage
from rayrl.runs.stage_metrics import LedgerCounts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(Generic[Question]):
    """The right to make one call. Ends in `Ledger.commit` or `Ledger.lose`."""

    attempt: int
    question: Question
    estimated_usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a stage's questions will find in the ledger, before any of them is asked."""

    num_known: int
    """Questions that are answered already."""
    num_new: int
    num_earlier: int
    """Answers that this run's stage has paid for, and that are to none of these questions."""
    num_reworded: int
    """Of those, answers about the same texts: another judge prompt or another judge was asked."""
    num_left: int
    """Questions that the budget of their purpose still pays for."""
    num_lost: int
    """Calls of that budget whose answers were lost."""
    is_whole: bool = False
    """Whether the questions are to come in one call: people are asked about all of them at once."""


class Ledger:
    """Account of paid questions, open for one run. Methods are atomic, and safe to call from several threads.

    Args:
        location: a local path, or an fsspec URL.
        budgets: how many attempts of this run each purpose may pay for.
        run: id of the run (`rayrl.runs.run.Run.id`).
        is_own: whether it is the run's own ledger, and not one that several runs share. What an older rayrl wrote into
            it is then this run's.
        budget_usd: hard limit over all purposes of this run; needs an honest upper bound with every reservation.
        owner_wait_s: how long a restarted owner waits for its killed predecessor to be gone.

    Raises:
        RunDirectoryError: the file is no ledger, or another live process owns it.
    """

    def __init__(
        self,
        location: str,
        budgets: Mapping[str, int],
        *,
        run: str = "",
        is_own: bool = True,
        budget_usd: float | None = None,
        owner_wait_s: float = 30.0,
    ) -> None:
        self._location = location
        self._budgets = dict(budgets)
        self._run = run
        self._failure: Exception | None = None
        self._budget_usd = budget_usd
        self._remote = location if is_remote(location) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="rayrl-ledger-") if self._remote else None
        path = working_copy(location, self._scratch.name) if self._scratch else Path(location)
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._owner = own(path, owner_wait_s)
        self._lock = threading.Lock()
        # The wait for the disk, or the upload, that is under way.
        self._under_way: asyncio.Future[None] | None = None
        self._num_writes = self._num_committed = self._num_durable = 0
        try:
            self._db = sql.connect(path)
            if is_own:
                self._db.execute(sql.ADOPT, (run,))
            num_lost = self._db.execute(sql.LOSE_ALL).rowcount
            spent = self._db.execute(sql.SPENT, (run,)).fetchall()
        except sqlite3.DatabaseError as error:
            # The lock must not outlive this object: the user may mend the file and open it again.
            self._owner.close()
            raise RunDirectoryError(f"{location} is not a usable ledger: {error}") from None
        # Counted here and kept up to date, so that a reservation need not add up the whole table.
        self._num_spent: dict[str, int] = {purpose: count for purpose, count, _ in spent}
        self._spent_usd: float = sum(usd for _, _, usd in spent)
        if num_lost:
            logger.warning("%d calls were under way when the last process died: counted as spent", num_lost)

    def reserve(
        self, question: Question, estimated_usd: float | None = None, *, stage: str = ""
    ) -> Reserved[Question] | Question:
        """Reserve the right to ask, or return the answer if it was paid for already, by whatever run and purpose.

        Args:
            question: with its key, oracle and purpose (`rayrl.oracles.questions.address`).
            estimated_usd: the most that the call may cost; None where the oracle has no price.
            stage: the stage that asks.

        Raises:
            BudgetExhausted: one more call could exceed the purpose's budget; `UsdExhausted`: the budget in USD.
        """
        with self._transaction() as db:
            row = db.execute(sql.KNOWN, (question.key,)).fetchone()
            if row is not None and row["state"] != "reserved":
                if row["run"] != self._run or row["stage"] not in ("", stage):
                    taken_over = {"run": self._run, "stage": stage, "purpose": question.purpose}
                    db.execute(sql.TAKE_OVER, taken_over | {"oracle": question.oracle, "key": question.key})
                return _known(question, row)
            assert row is None, f"question {question.key} is already under way"
            self._refuse_overspending(question.purpose, estimated_usd or 0.0)
            attempt = sql.insert(db, question, run=self._run, stage=stage, estimated_usd=estimated_usd)
            self._num_spent[question.purpose] = self._num_spent.get(question.purpose, 0) + 1
            self._spent_usd += estimated_usd or 0.0
        return Reserved(attempt=attempt, question=question, estimated_usd=estimated_usd)

    def commit(self, reserved: Reserved[Question], verdict: Verdict) -> Question:
        """Keep the result of the call. An abstention that cost nothing gives its reservation back."""
        answer = answered(reserved.question, verdict)
        with self._transaction() as db:
            sql.settle(
                db,
                reserved.attempt,
                answer,
                state="refunded" if verdict.is_refunded else answer.status,
                disagreement=verdict.disagreement,
                input_tokens=verdict.input_tokens,
                output_tokens=verdict.output_tokens,
            )
        with self._lock:
            self._spent_usd += (answer.cost_usd or 0.0) - (reserved.estimated_usd or 0.0)
            if verdict.is_refunded:
                self._num_spent[answer.purpose] -= 1
        return answer

    def lose(self, *attempts: int) -> None:
        """Give up calls of unknown outcome, or answers of a failed judge: they stay counted, and may be asked again."""
        with self._transaction() as db:
            db.executemany(sql.LOSE, [(attempt,) for attempt in attempts])

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Return those of the questions that are answered, by whatever run."""
        with self._lock:
            return {row[0] for row in self._db.execute(sql.ANSWERED_KEYS, (json.dumps(sorted(set(keys))),))}

    def disagreements(self, keys: Iterable[str]) -> dict[str, float | None]:
        """Return how far the judges of answered questions differ; None where one judge gave one score."""
        with self._lock:
            return dict(map(tuple, self._db.execute(sql.DISAGREEMENTS, (json.dumps(sorted(set(keys))),))))

    def num_left(self, purpose: str) -> int:
        """Count the questions that a purpose's budget still pays for."""
        with self._lock:
            return max(0, self._budgets.get(purpose, 0) - self._num_spent.get(purpose, 0))

    def num_payable(self, usd: float | None) -> float:
        """Count the questions of a price that the budget in USD still pays for; infinity without a budget or price."""
        with self._lock:
            if self._budget_usd is None or not usd:
                return math.inf
            return math.floor(round((self._budget_usd - self._spent_usd) / usd, 9))

    def annotate(self, key: str, annotations: Iterable[Mapping[str, object]]) -> None:
        """Keep what each person said about a question."""
        with self._transaction() as db:
            db.executemany(sql.ANNOTATE, [{"key": key, **each} for each in annotations])

    def num_spent(self, keys: Iterable[str], purpose: str) -> int:
        """Count what these questions took of a purpose's budget, with the calls that were lost on the way."""
        with self._lock:
            return self._db.execute(sql.SPENT_ON, (self._run, purpose, json.dumps(sorted(set(keys))))).fetchone()[0]

    def outlook(self, questions: Sequence[Judgement | Comparison], purpose: str, stage: str) -> Outlook:
        """Tell what a stage's questions, with their keys, will find in the ledger and in their purpose's budget."""
        keys = {question.key for question in questions}
        with self._lock:
            known = {row[0] for row in self._db.execute(sql.ANSWERED_KEYS, (json.dumps(sorted(keys)),))}
            earlier = [
                row for row in self._db.execute(sql.ANSWERED, (self._run, purpose, stage)) if row["key"] not in keys
            ]
            num_lost = self._db.execute(sql.NUM_LOST, (self._run, purpose)).fetchone()[0]
            num_left = self._budgets.get(purpose, 0) - self._num_spent.get(purpose, 0)
        about = {_texts(question) for question in questions}
        return Outlook(
            num_known=len(known),
            num_new=len(keys) - len(known),
            num_earlier=len(earlier),
            num_reworded=sum(tuple(row)[1:] in about for row in earlier),
            num_left=num_left,
            num_lost=num_lost,
        )

    def spending(self) -> tuple[dict[str, int], float]:
        """Queries per purpose and USD of this run that are spent, or held for calls under way."""
        with self._lock:
            return dict(self._num_spent), self._spent_usd

    def summary(self) -> dict[str, LedgerCounts]:
        """Count the run's queries of every purpose. What is in flight is held back from the budget too."""
        with self._lock:
            return sql.counts(self._db, self._run, self._budgets)

    def flush(self) -> None:
        """Hand everything written so far to the operating system: it survives this process, however that ends."""
        with self._lock:
            self._commit()

    async def keep(self) -> None:
        """Keep everything written so far, as `flush` does, and remotely where that is the truth.

        Callers that come together share one commit.
        """
        wanted = self._num_writes
        await asyncio.sleep(0)
        if self._num_committed < wanted:
            self.flush()
        if self._remote is not None:
            await self.sync()

    async def sync(self) -> None:
        """Make everything written so far durable: on the disk, so that it survives the machine, and remotely.

        Callers that come together share one wait for the disk, or one upload.
        """
        wanted = self._num_writes
        # Lets those write that are ready to: the wait below is then theirs too.
        await asyncio.sleep(0)
        while self._num_durable < wanted:
            if self._under_way is not None:  # it may have begun before these writes
                await asyncio.wait([self._under_way])
                continue
            self._under_way = asyncio.get_running_loop().create_future()
            try:
                with self._lock:
                    self._commit()
                    num_writes = self._num_writes
                    snapshot = None if self._remote is None else self._db.serialize()
                if self._remote is not None and snapshot is not None:
                    await asyncio.to_thread(storage.write_bytes, self._remote, snapshot)
                else:
                    await asyncio.to_thread(self._sync_log)
                self._num_durable = num_writes
            finally:
                self._under_way.set_result(None)
                self._under_way = None

    def close(self) -> None:
        """Give the file up. Attempts that are still reserved are lost when it is opened again."""
        # Closed already, or not to be written: that was told to whoever wanted to write.
        with self._lock, contextlib.suppress(sqlite3.ProgrammingError, RunDirectoryError):
            self._commit()
        with self._lock:
            sql.close(self._db)
            self._owner.close()
            if self._scratch:
                self._scratch.cleanup()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """Write all or nothing, into the transaction that the next `flush` or `sync` commits."""
        with self._lock, self._refusing_after_a_failure():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("SAVEPOINT step")
            try:
                yield self._db
            except BudgetExhausted:
                self._db.execute("ROLLBACK TO step")
                raise
            finally:
                self._db.execute("RELEASE step")
            self._num_writes += 1

    def _commit(self) -> None:
        with self._refusing_after_a_failure():
            if self._db.in_transaction:
                self._db.execute("COMMIT")
            self._num_committed = self._num_writes

    def _sync_log(self) -> None:
        """Wait until the disk has the write-ahead log. Without one, each commit has waited by itself."""
        with self._refusing_after_a_failure(), contextlib.suppress(FileNotFoundError):
            log = os.open(f"{self._path}-wal", os.O_RDONLY)
            try:
                os.fsync(log)
            finally:
                os.close(log)

    @contextlib.contextmanager
    def _refusing_after_a_failure(self) -> Generator[None]:
        """Refuse everything once a write has failed: SQLite has undone what others wrote with it, and await it."""
        if self._failure is None:
            try:
                yield
                return
            except sqlite3.ProgrammingError:  # it was closed
                raise
            except (sqlite3.Error, OSError) as error:
                self._failure = error
        raise RunDirectoryError(
            f"the ledger {self._location} could not be written ({self._failure}), and nothing more is asked: make room "
            "on its disk, and run the same command again; what was answered before is kept"
        ) from None

    def _refuse_overspending(self, purpose: str, estimated_usd: float) -> None:
        budget, spent = self._budgets.get(purpose, 0), self._num_spent.get(purpose, 0)
        if spent >= budget:
            raise BudgetExhausted(f"budget for {purpose} must cover every query: all {budget} are spent")
        # To the billionth of a dollar, so that 25 queries of 0.01 fit into 0.25 in floating point too.
        if self._budget_usd is not None and round(self._spent_usd + estimated_usd, 9) > self._budget_usd:
            raise UsdExhausted(
                f"oracle.budget_usd must cover every query: {self._spent_usd:.4f} of {self._budget_usd:.4f} USD "
                f"are spent or held with {spent} of {budget} queries for {purpose}, and one more may cost "
                f"{estimated_usd:.4f}. Raise it, and run the same command again, which goes on where this one stopped"
            )


def _texts(question: Judgement | Comparison) -> tuple[str | None, ...]:
    """Return the texts of a question as the ledger keeps them: prompt, response, first, second."""
    if isinstance(question, Judgement):
        return (question.prompt, question.response, None, None)
    return (question.prompt, None, question.first, question.second)


def _known(question: Question, row: sqlite3.Row) -> Question:
    """Answer a question from the ledger."""
    paid = sql.read_answer(row, type(question))
    answer = reused(question, paid)
    # A caller that repeats its question, after a restart or in a rerun, sees the cost again: it is the one who paid.
    is_same_question = replace(answer, cost_usd=paid.cost_usd) == paid
    return paid if is_same_question else answer
