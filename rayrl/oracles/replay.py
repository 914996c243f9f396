"""Tables of earlier judgements and comparisons as the oracle: reruns without paying, experiments on published ones."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import csv
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable
from typing import Any, cast

import pyarrow.parquet as parquet

from rayrl.config import ReplayOracleConfig
from rayrl.errors import DataError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.records import Row, content_id
from rayrl.runs import storage

_NOT_IN_TABLE = Verdict(score=None, rationale="not in the table", billed=False)


class ReplayOracle:
    """Answers from tables. A question that they do not hold, or hold without a usable answer, abstains unbilled.

    Of several rows about the same response the first counts. Of several rows about the same two responses the first in
    the order asked for counts, and without one the first in the other order, turned around.
    """

    def __init__(self, config: ReplayOracleConfig, rubric: Rubric) -> None:
        self._rubric = rubric
        self._scores: dict[str, tuple[float, str]] = {}
        self._shares: dict[str, tuple[float, str]] = {}
        self.name = f"replay:{_table_name(config.path)}"
        self.comparer = f"replay:{_table_name(config.comparisons_path)}"
        if config.path is not None:
            self._read_judgements(config, config.path)
        if config.comparisons_path is not None:
            self._read_comparisons(config, config.comparisons_path)

    def check(self) -> None:
        """Do nothing: the tables were read when this object was made."""

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        return 0.0

    async def judge(self, prompt: str, response: str) -> Verdict:
        if (found := self._scores.get(content_id(prompt, response))) is None:
            return _NOT_IN_TABLE
        score, rationale = found
        if not self._rubric.accepts(score):
            scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
            return Verdict(score=None, rationale=f"not a score from {scale}: {score}", billed=False)
        return Verdict(score=score, rationale=rationale, cost_usd=0.0)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        if (found := self._shares.get(content_id(prompt, first, second))) is not None:
            return Verdict(score=found[0], rationale=found[1], cost_usd=0.0)
        if (found := self._shares.get(content_id(prompt, second, first))) is not None:
            return Verdict(score=1.0 - found[0], rationale=found[1], cost_usd=0.0)
        return _NOT_IN_TABLE

    def _read_judgements(self, config: ReplayOracleConfig, path: str) -> None:
        for row in _rows(path, config.judgement_columns, "oracle.path"):
            key = content_id(str(row[config.prompt_column]), str(row[config.response_column]))
            self._scores.setdefault(key, (_number(row[config.score_column]), _rationale(row, config)))
        if not self._scores:
            raise DataError(f"oracle.path {path} holds no judgements; name a table with a row for each")

    def _read_comparisons(self, config: ReplayOracleConfig, path: str) -> None:
        """Read the rows whose preference is one of the three words, and skip all others."""
        share_of_word: dict[str, float] = {**PREFERENCE_SHARES}
        for row in _rows(path, config.comparison_columns, "oracle.comparisons_path"):
            share = share_of_word.get(str(row[config.preference_column]).strip().lower())
            if share is None:
                continue
            prompt, first = str(row[config.prompt_column]), str(row[config.first_column])
            key = content_id(prompt, first, str(row[config.second_column]))
            self._shares.setdefault(key, (share, _rationale(row, config)))
        if not self._shares:
            words = '"first", "second" or "tie"'
            raise DataError(
                f"oracle.comparisons_path {path} must hold {words} in column {config.preference_column}, "
                "and no row does; name the right table, or oracle.preference_column"
            )


def _table_name(path: str | None) -> str:
    """Name a table by its file and content: another table of that name is another oracle."""
    if path is None:
        return "none"
    try:
        content = hashlib.blake2b(storage.read_bytes(path), digest_size=4).hexdigest()
    except OSError:
        content = ""  # refused when it is read
    return f"{path.rstrip('/').rpartition('/')[2]} {content}"


def _rationale(row: Row, config: ReplayOracleConfig) -> str:
    return str(row.get(config.rationale_column) or "") if config.rationale_column else ""


def _rows(path: str, needed: list[str], setting: str) -> Iterable[Row]:
    """Yield the rows of a file, each of which must have the needed columns."""
    for number, row in enumerate(_read(path, setting), start=1):
        for column in needed:
            if column not in row:
                columns = ", ".join(map(str, row)) or "none"
                raise DataError(f"{setting} {path}, row {number}: no column {column}; there are: {columns}")
        yield row


def _read(path: str, setting: str) -> list[Row]:
    """Read a JSONL, JSON, CSV or Parquet file, gzip'd or not, on any filesystem."""
    try:
        content = storage.read_bytes(path)
    except OSError as error:
        raise DataError(f"{setting} must be a file, got {path}: {error}") from None
    suffix = path.removesuffix(".gz").rpartition(".")[2]
    try:
        content = gzip.decompress(content) if path.endswith(".gz") else content
        match suffix:
            case "jsonl":
                # Not splitlines: a JSON text may hold other line separators.
                return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
            case "json":
                return json.loads(content)
            case "csv":
                return list(csv.DictReader(io.StringIO(content.decode(), newline="")))
            case "parquet":
                return cast(list[Row], parquet.read_table(io.BytesIO(content)).to_pylist())
            case _:
                pass
    except (ValueError, OSError, EOFError, csv.Error) as error:  # Arrow's and JSON's errors are ValueErrors
        raise DataError(f"{setting} {path} is not a readable {suffix} file: {error}") from None
    raise DataError(f"{setting} must end in .jsonl, .json, .csv or .parquet, or in one of these and .gz; got {path}")


def _number(cell: Any) -> float:
    """Read a cell with a score; an empty or unreadable one is NaN, which is on no scale."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
