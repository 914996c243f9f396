"""Tables of earlier judgements and comparisons as the oracle: reruns without paying, experiments on published ones."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from rayrl.config import ReplayOracleConfig
from rayrl.config.oracle import OracleTable
from rayrl.data.cells import canonical, number_cell, text_cell
from rayrl.data.chats import conversation_text, read_chat
from rayrl.data.files import files_of
from rayrl.data.rows import Row, read_rows
from rayrl.errors import DataError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.records import content_id
from rayrl.runs import storage

_NOT_IN_TABLE = Verdict(score=None, rationale="not in the table", billed=False)


Answer = tuple[float | None, str]
"""(score, or share of the first response; rationale)."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of one table, by the key of their question (see `key_of`)."""

    by_question: dict[str, Answer] = field(default_factory=dict[str, Answer])
    prompts: set[str] = field(default_factory=set[str])
    """Keys of the prompts."""
    contradictions: list[str] = field(default_factory=list[str])
    """Rows that give another score or preference than an earlier row about the same."""

    def add(self, row: Row, prompt: str, texts: tuple[str, ...], answer: Answer) -> None:
        """Add an answer; of several about the same, the first counts."""
        first, _ = self.by_question.setdefault(key_of(prompt, *texts), answer)
        self.prompts.add(key_of(prompt))
        if first != answer[0]:
            self.contradictions.append(row.where)


def key_of(*texts: str) -> str:
    """Hash the texts of a question, in which only white space at the ends of lines may differ (see `canonical`)."""
    return content_id(*map(canonical, texts))


def read_answers(table: OracleTable) -> Answers:
    """Read a table.

    Raises:
        DataError: it is missing, empty or malformed, lacks a column, or a row holds no text or score; the message names
            the setting and the row.
    """
    try:
        answers = _read_judgements(table) if table.holds == "judgements" else _read_comparisons(table)
    except DataError as error:
        raise DataError(f"{table.setting}: {error}") from None
    return answers


def _read_judgements(table: OracleTable) -> Answers:
    answers = Answers()
    prompt_column, response_column, score_column, *_ = table.columns
    for row, prompt, rationale in _rows(table, prompt_column, num_columns=3):
        response = text_cell(row.cells.get(response_column), response_column, row.where)
        score = number_cell(row.cells.get(score_column), score_column, row.where)
        answers.add(row, prompt, (response,), (score, rationale))
    return answers


def _read_comparisons(table: OracleTable) -> Answers:
    """Read the rows whose preference is one of the three words, and skip all others."""
    share_of_word: dict[str, float] = {**PREFERENCE_SHARES}
    answers = Answers()
    prompt_column, first_column, second_column, preference_column, *_ = table.columns
    for row, prompt, rationale in _rows(table, prompt_column, num_columns=4):
        first, second = (
            text_cell(row.cells.get(column), column, row.where) for column in (first_column, second_column)
        )
        share = share_of_word.get(str(row.cells.get(preference_column)).strip().lower())
        if share is not None:
            answers.add(row, prompt, (first, second), (share, rationale))
    if not answers.by_question:
        words = '"first", "second" or "tie"'
        raise DataError(
            f"{table.path} must hold {words} in column {preference_column}, and no row does; name the right table, or "
            "oracle.preference_column"
        )
    return answers


def _rows(table: OracleTable, prompt_column: str, *, num_columns: int) -> Iterator[tuple[Row, str, str]]:
    """Yield every row with its prompt and its rationale, "" without one."""
    rationale_column = table.columns[-1] if len(table.columns) > num_columns else None
    for row in read_rows(table.path, table.columns, encoding=table.encoding):
        cell = row.cells.get(prompt_column)
        if isinstance(cell, list):
            prompt = conversation_text(read_chat(cast("object", cell), row.where))
        else:
            prompt = text_cell(cell, prompt_column, row.where)
        yield row, prompt, str(row.cells.get(rationale_column) or "") if rationale_column else ""


class ReplayOracle:
    """Answers from tables. A question that they do not hold, or hold without a usable answer, abstains unbilled.

    Of several rows about the same response the first counts. Of several rows about the same two responses the first in
    the order asked for counts, and without one the first in the other order, turned around.
    """

    def __init__(self, config: ReplayOracleConfig, rubric: Rubric) -> None:
        self._rubric = rubric
        self._scores: dict[str, Answer] = {}
        self._shares: dict[str, Answer] = {}
        for table in config.tables():
            answers = read_answers(table).by_question
            (self._scores if table.holds == "judgements" else self._shares).update(answers)
        self.name = f"replay:{_table_name(config.path)}"
        self.comparer = f"replay:{_table_name(config.comparisons_path)}"

    def check(self) -> None:
        """Do nothing: the tables were read when this object was made."""

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        return 0.0

    async def judge(self, prompt: str, response: str) -> Verdict:
        if (found := self._scores.get(key_of(prompt, response))) is None:
            return _NOT_IN_TABLE
        score, rationale = found
        if score is None:
            return Verdict(score=None, rationale="the table holds no score", billed=False)
        if not self._rubric.accepts(score):
            scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
            return Verdict(score=None, rationale=f"not a score from {scale}: {score}", billed=False)
        return Verdict(score=score, rationale=rationale, cost_usd=0.0)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        if (found := self._shares.get(key_of(prompt, first, second))) is not None:
            return Verdict(score=found[0], rationale=found[1], cost_usd=0.0)
        if (found := self._shares.get(key_of(prompt, second, first))) is not None:
            assert found[0] is not None  # a row without a preference is no answer
            return Verdict(score=1.0 - found[0], rationale=found[1], cost_usd=0.0)
        return _NOT_IN_TABLE


def _table_name(path: str | None) -> str:
    """Name a table by its file and content: another table of that name is another oracle."""
    if path is None:
        return "none"
    digest = hashlib.blake2b(digest_size=4)
    for file in files_of(path):
        digest.update(storage.read_bytes(file))
    return f"{path.rstrip('/').rpartition('/')[2]} {digest.hexdigest()}"
