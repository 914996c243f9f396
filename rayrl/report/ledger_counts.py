"""Counts of a run's ledger, read while another process has it open.

The file is opened read-only; a remote ledger is read as of its last upload. One that cannot be read counts nothing: the
manifests then tell what was paid when their stages ended.
"""

import contextlib
import logging
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rayrl.oracles import ledger_schema
from rayrl.oracles.ledger_file import working_copy
from rayrl.runs import storage
from rayrl.runs.run import LEDGER
from rayrl.runs.stage_metrics import SPENT_STATES, LedgerCounts

logger = logging.getLogger(__name__)

_ASKED = f"SELECT strftime('%s', reserved_at) FROM attempts WHERE purpose = ? AND state IN {SPENT_STATES}"

Value = str | int | float


def ledger_counts(run_dir: str) -> dict[str, LedgerCounts]:
    """Count the queries of every purpose that has some; empty where the ledger cannot be read.

    The file does not keep the budgets: they are 0 here.
    """
    num_by_state: dict[str, dict[str, int]] = {}
    cost_usd: dict[str, float] = {}
    for purpose, state, num, usd in _rows(run_dir, ledger_schema.SUMMARY):
        num_by_state.setdefault(str(purpose), {})[str(state)] = int(num)
        cost_usd[str(purpose)] = cost_usd.get(str(purpose), 0.0) + float(usd)
    return {
        purpose: LedgerCounts.from_states(states, budget=0, cost_usd=cost_usd[purpose])
        for purpose, states in num_by_state.items()
    }


def asked_at(run_dir: str, purpose: str) -> list[float]:
    """Read when every query was asked that is paid for: Unix times, to the second."""
    return [float(second) for (second,) in _rows(run_dir, _ASKED, purpose)]


def _rows(run_dir: str, sql: str, *values: str) -> list[tuple[Value, ...]]:
    url = storage.join(run_dir, LEDGER)
    if not storage.exists(url):
        return []
    try:
        with _opened(url) as ledger:
            return ledger.execute(sql, values).fetchall()
    except sqlite3.DatabaseError as error:
        logger.warning("%s cannot be read (%s): spending is shown as of the last finished stage", url, error)
        return []


@contextlib.contextmanager
def _opened(url: str) -> Iterator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory() as folder:
        # Read-only: the file belongs to the process that pays.
        path = Path(storage.locate(url)[1]) if storage.is_local(url) else working_copy(url, folder)
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            yield ledger
