"""Schema of the ledger: one table of attempts, and the statements that read and write it.

An attempt has the columns of the record that it is about (`Judgement` or `Comparison`; those of the other kind are
NULL), the tokens of the call and its time. Its `state` is the record's status, and more: see `rayrl.oracles.ledger`.
"""

import sqlite3
from dataclasses import fields
from pathlib import Path

from rayrl.oracles.questions import Question
from rayrl.records import Comparison, Judgement, Row, to_row

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    purpose TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'scored', 'abstained', 'refunded', 'lost')),
    oracle TEXT NOT NULL,
    prompt_id TEXT NOT NULL,
    prompt TEXT NOT NULL,
    response_id TEXT,
    response TEXT,
    score REAL,
    first_id TEXT,
    second_id TEXT,
    first TEXT,
    second TEXT,
    preference TEXT CHECK (preference IN ('first', 'second', 'tie')),
    rationale TEXT NOT NULL DEFAULT '',
    cost_usd REAL NOT NULL,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reserved_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CHECK ((score IS NOT NULL OR preference IS NOT NULL) = (state = 'scored'))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON attempts (key)
    WHERE state IN ('reserved', 'scored', 'abstained');
"""

_COLUMNS_OF_COMPARISONS = {"first_id", "second_id", "preference"}

KNOWN = "SELECT * FROM attempts WHERE key = ? AND state IN ('reserved', 'scored', 'abstained')"
LOSE = "UPDATE attempts SET state = 'lost' WHERE attempt = ?"
LOSE_ALL = "UPDATE attempts SET state = 'lost' WHERE state = 'reserved'"
ANSWERS = """
SELECT * FROM attempts WHERE purpose = ? AND state IN ('scored', 'abstained') AND {id_column} IS NOT NULL
ORDER BY attempt
"""
SPENT = "SELECT purpose, count(*), sum(cost_usd) FROM attempts WHERE state != 'refunded' GROUP BY purpose"
SPENT_ON = """
SELECT count(*) FROM attempts WHERE purpose = ? AND state != 'refunded' AND key IN (SELECT value FROM json_each(?))
"""
SUMMARY = "SELECT purpose, state, count(*), sum(cost_usd) FROM attempts GROUP BY purpose, state"
_SETTLE = """
UPDATE attempts SET state = :state, {value} = :{value}, rationale = :rationale, cost_usd = :cost_usd,
    input_tokens = :input_tokens, output_tokens = :output_tokens
WHERE attempt = :attempt AND state = 'reserved'
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger in a file, made if need be.

    Raises:
        sqlite3.DatabaseError: the file is something else, or a ledger of another version.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")  # stays a rollback journal where the filesystem needs it
    db.execute("PRAGMA synchronous = FULL")
    db.executescript(_SCHEMA)
    columns = {row["name"] for row in db.execute("PRAGMA table_info(attempts)")}
    if not columns >= _COLUMNS_OF_COMPARISONS:  # an older ledger would fail only after questions were paid for
        db.close()
        raise sqlite3.DatabaseError("its table is of another version of rayrl; choose another run_dir")
    return db


def insert(db: sqlite3.Connection, question: Judgement | Comparison, estimated_usd: float) -> int:
    """Write a question as a reserved attempt, at its highest price. Returns the attempt's number."""
    values = to_row(question) | {"cost_usd": estimated_usd}
    del values["status"]
    columns = ", ".join(values)
    placeholders = ", ".join(f":{column}" for column in values)
    statement = f"INSERT INTO attempts (state, {columns}) VALUES ('reserved', {placeholders})"
    attempt = db.execute(statement, values).lastrowid
    assert attempt is not None
    return attempt


def settle(
    db: sqlite3.Connection,
    attempt: int,
    answer: Judgement | Comparison,
    *,
    state: str,
    input_tokens: int,
    output_tokens: int,
) -> None:
    """Write the answer into its reserved attempt."""
    value = "score" if isinstance(answer, Judgement) else "preference"
    values: Row = {
        **to_row(answer),
        "attempt": attempt,
        "state": state,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    num_changed = db.execute(_SETTLE.format(value=value), values).rowcount
    assert num_changed == 1, f"attempt {attempt} is not reserved"


def read_answer(row: sqlite3.Row, record: type[Question]) -> Question:
    """Read a scored or abstained attempt."""
    columns = {field.name: field.name for field in fields(record)} | {"status": "state"}
    return record(**{name: row[column] for name, column in columns.items()})
