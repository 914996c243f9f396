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

from rayrl.config import RunConfig
from rayrl.oracles import ledger_schema
from rayrl.oracles.ledger_file import working_copy
from rayrl.runs import storage
from rayrl.runs.run import identity, ledger_url
from rayrl.runs.stage_metrics import SPENT_STATES, LedgerCounts

logger = logging.getLogger(__name__)

_ASKED = f"SELECT strftime('%s', reserved_at) FROM attempts WHERE run = ? AND purpose = ? AND state IN {SPENT_STATES}"


def ledger_counts(url: str, config: RunConfig) -> dict[str, LedgerCounts]:
    """Count the queries of every purpose that has some; empty where the ledger cannot be read.

    The file does not keep the budgets: they are 0 here.
    """
    with reading(url, config) as ledger:
        return {} if ledger is None else ledger_schema.counts(ledger, identity(url), {})


def asked_at(url: str, config: RunConfig, purpose: str) -> list[float]:
    """Read when every query was asked that is paid for: Unix times, to the second."""
    with reading(url, config) as ledger:
        rows = [] if ledger is None else ledger.execute(_ASKED, (identity(url), purpose)).fetchall()
        return [float(second) for (second,) in rows]


@contextlib.contextmanager
def reading(url: str, config: RunConfig) -> Iterator[sqlite3.Connection | None]:
    """Open the ledger of the run in a folder to read it; None where there is none, or it cannot be read."""
    location = ledger_url(url, config)
    if not storage.exists(location):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        # Read-only: the file belongs to the process that pays.
        path = Path(storage.locate(location)[1]) if storage.is_local(location) else working_copy(location, folder)
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            ledger.row_factory = sqlite3.Row
            try:
                ledger.execute("SELECT run FROM attempts LIMIT 1")
            except sqlite3.DatabaseError as error:
                logger.warning(
                    "%s cannot be read (%s): spending is shown as of the last finished stage", location, error
                )
                yield None
                return
            yield ledger
