"""What a run's ledger counts, read while its owner has it open; nothing is changed."""

import contextlib
import logging
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrl.oracles.ledger_file import working_copy
from rayrl.runs import storage

logger = logging.getLogger(__name__)

COUNTS = ("spent", "scored", "abstained", "lost", "refunded")
_COUNTED = "SELECT purpose, state, count(*), sum(cost_usd) FROM attempts GROUP BY purpose, state"
_ASKED = """
SELECT strftime('%s', reserved_at) FROM attempts WHERE purpose = ? AND state IN ('scored', 'abstained', 'lost')
"""


def spending(run_dir: str) -> dict[str, dict[str, Any]]:
    """What the ledger itself counts, by purpose; empty where it cannot be read."""
    counts: dict[str, dict[str, Any]] = {}
    for purpose, state, num, usd in _rows(run_dir, _COUNTED):
        count = counts.setdefault(purpose, dict.fromkeys(COUNTS, 0))
        count["in_flight" if state == "reserved" else state] = num
        count["spent"] += num if state in ("scored", "abstained", "lost") else 0
        count["cost_usd"] = count.get("cost_usd", 0.0) + usd
    return counts


def asked_at(run_dir: str, purpose: str) -> list[float]:
    """When every query was asked that is paid for: Unix times, to the second."""
    return [float(second) for (second,) in _rows(run_dir, _ASKED, purpose)]


def _rows(run_dir: str, sql: str, *values: str) -> list[Any]:
    url = storage.join(run_dir, "ledger.sqlite")
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
        path = Path(storage.locate(url)[1]) if storage.is_local(url) else working_copy(url, folder)
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            yield ledger
