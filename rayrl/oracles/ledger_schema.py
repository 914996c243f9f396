"""The ledger's one table, and the statements that read and write it."""

import sqlite3
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    purpose TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'scored', 'abstained', 'refunded', 'lost')),
    prompt_id TEXT NOT NULL,
    response_id TEXT NOT NULL,
    prompt TEXT NOT NULL,
    response TEXT NOT NULL,
    oracle TEXT NOT NULL,
    score REAL,
    rationale TEXT NOT NULL DEFAULT '',
    cost_usd REAL NOT NULL,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reserved_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CHECK ((score IS NOT NULL) = (state = 'scored'))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON attempts (key)
    WHERE state IN ('reserved', 'scored', 'abstained');
"""
_ADDED = {"second_id": "TEXT", "second": "TEXT"}
"""The other response of a comparison, NULL in a judgement; ledgers of before comparisons lack these columns."""

KNOWN = "SELECT * FROM attempts WHERE key = ? AND state IN ('reserved', 'scored', 'abstained')"
RESERVE = """
INSERT INTO attempts
    (key, purpose, state, prompt_id, response_id, second_id, prompt, response, second, oracle, cost_usd)
VALUES
    (:key, :purpose, 'reserved', :prompt_id, :response_id, :second_id, :prompt, :response, :second, :oracle, :cost_usd)
"""
SETTLE = """
UPDATE attempts SET state = ?, score = ?, rationale = ?, cost_usd = ?, input_tokens = ?, output_tokens = ?
WHERE attempt = ? AND state = 'reserved'
"""
JUDGED = """
SELECT * FROM attempts WHERE purpose = ? AND state IN ('scored', 'abstained') AND second_id IS NULL ORDER BY attempt
"""
COMPARED = JUDGED.replace("IS NULL", "IS NOT NULL")
SPENT = "SELECT purpose, count(*), sum(cost_usd) FROM attempts WHERE state != 'refunded' GROUP BY purpose"
SPENT_ON = """
SELECT count(*) FROM attempts WHERE purpose = ? AND state != 'refunded' AND key IN (SELECT value FROM json_each(?))
"""
SUMMARY = "SELECT purpose, state, count(*), sum(cost_usd) FROM attempts GROUP BY purpose, state"


def connect(path: Path) -> sqlite3.Connection:
    """The ledger in a file, made or brought up to date if need be.

    Raises:
        sqlite3.DatabaseError: the file is something else.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")  # stays a rollback journal where the filesystem needs it
    db.execute("PRAGMA synchronous = FULL")
    db.executescript(_SCHEMA)
    there = {row["name"] for row in db.execute("PRAGMA table_info(attempts)")}
    for column, kind in _ADDED.items():
        if column not in there:
            db.execute(f"ALTER TABLE attempts ADD COLUMN {column} {kind}")
    return db
