"""Counts of a run's ledger, read while another process has it open.

The file is opened read-only; a remote ledger is read as of its last upload. One that cannot be read counts nothing: the
manifests then tell what was paid when their stages ended.
"""

import contextlib
import io
import json
import logging
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from rayrl.config import RunConfig
from rayrl.errors import ConfigError, DataError
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


def spending_by_stage(location: str, runs: Sequence[str]) -> dict[tuple[str, ...], LedgerCounts]:
    """Count the queries of some runs by the stage that asked and the oracle that was asked; empty as above.

    Args:
        location: of the ledger.
        runs: ids by which it knows the runs.
    """
    with reading_file(location) as ledger:
        return {} if ledger is None else ledger_schema.counts_by(ledger, runs, "stage", "oracle")


def num_attempts(location: str, run: str) -> int:
    """Count the attempts of a run in a ledger; 0 where it cannot be read."""
    with reading_file(location) as ledger:
        if ledger is None:
            return 0
        return ledger.execute("SELECT count(*) FROM attempts WHERE run = ?", (run,)).fetchone()[0]


def export(location: str, target: str) -> int:
    """Write all attempts in a ledger, whichever run's, to a file.

    Args:
        location: of the ledger.
        target: a path or URL that ends in .parquet, .csv or .jsonl; or in .sqlite, for a ledger of its own.

    Returns:
        How many attempts there are.

    Raises:
        ConfigError: the target ends otherwise.
        DataError: there is no ledger that can be read.
    """
    suffix = target.rpartition(".")[2]
    if suffix not in ("parquet", "csv", "jsonl", "sqlite"):
        raise ConfigError(f"--export must end in .parquet, .csv, .jsonl or .sqlite, got {target}")
    if storage.absolute(target) == location:
        raise ConfigError(f"--export must be another file than the ledger itself, got {target}")
    with reading_file(location) as ledger:
        if ledger is None:
            raise DataError(f"{location} must be the ledger of a run, and none can be read there; name another run")
        rows = [dict(row) for row in ledger.execute(ledger_schema.ALL)]
        content = ledger.serialize() if suffix == "sqlite" else _encoded(rows, suffix)
    storage.write_bytes(target, content)
    return len(rows)


def _encoded(rows: list[dict[str, object]], suffix: str) -> bytes:
    if suffix == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    if suffix == "parquet":
        parquet.write_table(table, sink)
    else:
        csv.write_csv(table, sink)
    return sink.getvalue()


def asked_at(url: str, config: RunConfig, purpose: str) -> list[float]:
    """Read when every query was asked that is paid for: Unix times, to the second."""
    with reading(url, config) as ledger:
        rows = [] if ledger is None else ledger.execute(_ASKED, (identity(url), purpose)).fetchall()
        return [float(second) for (second,) in rows]


@contextlib.contextmanager
def reading(url: str, config: RunConfig) -> Iterator[sqlite3.Connection | None]:
    """Open the ledger of the run in a folder to read it; None where there is none, or it cannot be read."""
    with reading_file(ledger_url(url, config)) as ledger:
        yield ledger


@contextlib.contextmanager
def reading_file(location: str) -> Iterator[sqlite3.Connection | None]:
    """Open a ledger to read it; None where there is none, or it cannot be read."""
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
