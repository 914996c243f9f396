"""Schema of the ledger: one table of attempts, and the statements that read and write it.

An attempt has the columns of the record that it is about (`Judgement` or `Comparison`; those of the other kind are
NULL), the run and the stage that asked, the tokens of the call and its time. Its `state` is the record's status, and
more: see `rayrl.oracles.ledger`. A second table notes which answers a stage took over without paying, and a third what
each person said about a question that people answered; the score of a comparison is the share of its first response.
"""

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rayrl.oracles.questions import Question
from rayrl.records import Comparison, Judgement, Row, to_row
from rayrl.runs.stage_metrics import LedgerCounts

VERSION = 1
"""Of the schema, in the file's `user_version`. Files of version 0 are brought up to it when they are opened."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
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
    disagreement REAL,
    cost_usd REAL,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reserved_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CHECK ((score IS NOT NULL OR preference IS NOT NULL) = (state = 'scored'))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON attempts (key)
    WHERE state IN ('reserved', 'scored', 'abstained');
CREATE INDEX IF NOT EXISTS by_run ON attempts (run, purpose, state);
CREATE TABLE IF NOT EXISTS taken_over (
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
    purpose TEXT NOT NULL,
    oracle TEXT NOT NULL,
    key TEXT NOT NULL,
    PRIMARY KEY (run, stage, key)
);
CREATE TABLE IF NOT EXISTS annotations (
    key TEXT NOT NULL,
    annotator TEXT NOT NULL,
    score REAL,
    rationale TEXT NOT NULL,
    seconds REAL,
    PRIMARY KEY (key, annotator)
);
"""

# Version 0 belonged to one run, kept no stage, and wrote 0 where there was no price.
_FROM_VERSION_0 = """
ALTER TABLE attempts RENAME TO attempts_0;
DROP INDEX one_answer;
{schema}
INSERT INTO attempts
SELECT attempt, key, '', '', purpose, state, oracle, prompt_id, prompt, response_id, response, score, first_id,
    second_id, first, second, preference, rationale, NULL, nullif(cost_usd, 0), input_tokens, output_tokens, reserved_at
FROM attempts_0;
DROP TABLE attempts_0;
"""
_COLUMNS_OF_VERSION_0 = {"key", "purpose", "state", "oracle", "first_id", "second_id", "preference", "cost_usd"}

ANSWERED_KEYS = """
SELECT DISTINCT key FROM attempts
WHERE state IN ('scored', 'abstained') AND key IN (SELECT value FROM json_each(?))
"""
DISAGREEMENTS = """
SELECT key, disagreement FROM attempts
WHERE state IN ('scored', 'abstained') AND key IN (SELECT value FROM json_each(?))
"""
ANNOTATE = "INSERT OR REPLACE INTO annotations VALUES (:key, :annotator, :score, :rationale, :seconds)"
NUM_LOST = "SELECT count(*) FROM attempts WHERE run = ? AND purpose = ? AND state = 'lost'"
KNOWN = "SELECT * FROM attempts WHERE key = ? AND state IN ('reserved', 'scored', 'abstained')"
LOSE = "UPDATE attempts SET state = 'lost' WHERE attempt = ? AND state IN ('reserved', 'abstained')"
ADOPT = "UPDATE attempts SET run = ? WHERE run = ''"
LOSE_ALL = "UPDATE attempts SET state = 'lost' WHERE state = 'reserved'"
TAKE_OVER = "INSERT OR IGNORE INTO taken_over VALUES (:run, :stage, :purpose, :oracle, :key)"
SPENT = """
SELECT purpose, count(*), total(cost_usd) FROM attempts WHERE run = ? AND state != 'refunded' GROUP BY purpose
"""
SPENT_ON = """
SELECT count(*) FROM attempts
WHERE run = ? AND purpose = ? AND state != 'refunded' AND key IN (SELECT value FROM json_each(?))
"""
ANSWERED = """
SELECT key, prompt, response, first, second FROM attempts
WHERE run = ? AND purpose = ? AND stage IN ('', ?) AND state IN ('scored', 'abstained')
"""
_OF_RUNS = "run IN (SELECT value FROM json_each(?))"
_BY_STATE = """
SELECT {by}, state, count(*), sum(cost_usd), sum(input_tokens), sum(output_tokens)
FROM attempts WHERE {of_runs} GROUP BY {by}, state ORDER BY min(attempt)
"""
_TAKEN_OVER = "SELECT {by}, count(*) FROM taken_over WHERE {of_runs} GROUP BY {by}"
_ABSTENTIONS = """
SELECT {by}, substr(rationale, 1, {chars}) AS reason, count(*)
FROM attempts WHERE {of_runs} AND state = 'abstained' GROUP BY {by}, reason ORDER BY count(*) DESC, reason
"""
ALL = "SELECT * FROM attempts ORDER BY attempt"
REASON_CHARS = 80
"""Characters by which the reasons of abstentions are told apart."""
_SETTLE = """
UPDATE attempts SET state = :state, {value} = :{value}, rationale = :rationale, disagreement = :disagreement,
    cost_usd = :cost_usd, input_tokens = :input_tokens, output_tokens = :output_tokens
WHERE attempt = :attempt AND state = 'reserved'
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger in a file, made if need be; an older one is brought up to date, and its attempts are no run's.

    Raises:
        sqlite3.DatabaseError: the file is something else, or a ledger of another version.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        # It stays a rollback journal where the filesystem needs one; then every commit waits for the disk. The log of
        # the other kind is brought to the disk by `Ledger.sync`, for many commits at once.
        journal = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        db.execute(f"PRAGMA synchronous = {'NORMAL' if journal == 'wal' else 'FULL'}")
        _bring_up_to_date(db)
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def close(db: sqlite3.Connection) -> None:
    """Close the ledger, and leave one file: a write-ahead log beside it would be left behind when it is copied.

    Closing a ledger again does nothing.
    """
    # The log stays while somebody reads the file, and until the next owner closes it.
    with contextlib.suppress(sqlite3.Error):
        db.execute("PRAGMA journal_mode = DELETE")
    db.close()


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as blank:
        blank.executescript(_SCHEMA)
        columns_of_today = _columns(blank)
    columns, version = _columns(db), db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0 and columns >= _COLUMNS_OF_VERSION_0:
        script = _FROM_VERSION_0.format(schema=_SCHEMA)
    elif not columns or (version == VERSION and columns == columns_of_today):
        script = _SCHEMA
    else:  # it would fail only after questions were paid for
        raise sqlite3.DatabaseError(
            f"its table is of version {version}, and this rayrl writes version {VERSION}; open it with the rayrl that "
            "wrote it, or name another oracle.ledger"
        )
    db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {VERSION}; COMMIT;")


def _columns(db: sqlite3.Connection) -> set[str]:
    return {row[1] for row in db.execute("PRAGMA table_info(attempts)")}


def insert(
    db: sqlite3.Connection, question: Judgement | Comparison, *, run: str, stage: str, estimated_usd: float | None
) -> int:
    """Write a question as a reserved attempt, at its highest price. Returns the attempt's number."""
    values = to_row(question) | {"run": run, "stage": stage, "cost_usd": estimated_usd}
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
    disagreement: float | None,
    input_tokens: int,
    output_tokens: int,
) -> None:
    """Write the answer into its reserved attempt."""
    value = "score" if isinstance(answer, Judgement) else "preference"
    values: Row = {
        **to_row(answer),
        "attempt": attempt,
        "state": state,
        "disagreement": disagreement,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    num_changed = db.execute(_SETTLE.format(value=value), values).rowcount
    assert num_changed == 1, f"attempt {attempt} is not reserved"


def read_answer(row: sqlite3.Row, record: type[Question]) -> Question:
    """Read a scored or abstained attempt."""
    columns = {field.name: field.name for field in fields(record)} | {"status": "state"}
    return record(**{name: row[column] for name, column in columns.items()})


def counts(db: sqlite3.Connection, run: str, budgets: Mapping[str, int]) -> dict[str, LedgerCounts]:
    """Count a run's questions of every purpose that has a budget, or has asked some."""
    by_purpose = {purpose: found for (purpose,), found in counts_by(db, [run], "purpose").items()}
    nothing = LedgerCounts.from_states({}, budget=0, cost_usd=None)
    purposes = dict.fromkeys([*budgets, *by_purpose])
    return {purpose: replace(by_purpose.get(purpose, nothing), budget=budgets.get(purpose, 0)) for purpose in purposes}


def counts_by(db: sqlite3.Connection, runs: Sequence[str], *columns: str) -> dict[tuple[str, ...], LedgerCounts]:
    """Count the questions of some runs by the values of columns, which attempts and answers taken over both have.

    The file does not keep the budgets: they are 0 here.
    """
    by, size, of_runs = ", ".join(columns), len(columns), json.dumps(list(runs))
    states: dict[tuple[str, ...], list[sqlite3.Row]] = {}
    for row in db.execute(_BY_STATE.format(by=by, of_runs=_OF_RUNS), (of_runs,)):
        states.setdefault(tuple(row[:size]), []).append(row)
    num_taken_over: dict[tuple[str, ...], int] = {}
    for row in db.execute(_TAKEN_OVER.format(by=by, of_runs=_OF_RUNS), (of_runs,)):
        num_taken_over[tuple(row[:size])] = row[size]
    reasons: dict[tuple[str, ...], dict[str, int]] = {}
    for row in db.execute(_ABSTENTIONS.format(by=by, of_runs=_OF_RUNS, chars=REASON_CHARS), (of_runs,)):
        reasons.setdefault(tuple(row[:size]), {})[row[size]] = row[size + 1]
    found: dict[tuple[str, ...], LedgerCounts] = {}
    for group in dict.fromkeys([*states, *num_taken_over]):
        rows = states.get(group, [])
        priced = [row[size + 2] for row in rows if row[size + 2] is not None]
        found[group] = LedgerCounts.from_states(
            {row[size]: row[size + 1] for row in rows},
            budget=0,
            taken_over=num_taken_over.get(group, 0),
            abstentions=reasons.get(group, {}),
            cost_usd=sum(priced) if priced else None,
            input_tokens=sum(row[size + 3] for row in rows),
            output_tokens=sum(row[size + 4] for row in rows),
        )
    return found
