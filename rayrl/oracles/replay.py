"""A table of earlier judgements as the expert: reruns without paying, experiments on published judgements."""

import csv
import gzip
import io
import json
import math
from collections.abc import Iterable
from typing import Any

import fsspec
import pyarrow.parquet as parquet

from rayrl.config import ReplayOracleConfig
from rayrl.errors import DataError
from rayrl.models.judge import Rubric
from rayrl.oracles.protocol import Verdict
from rayrl.records import content_id


class ReplayOracle:
    """Answers from a table; what the table does not hold, or holds without a usable score, abstains unbilled.

    Of several rows about the same response the first counts.
    """

    def __init__(self, config: ReplayOracleConfig, rubric: Rubric) -> None:
        self._rubric = rubric
        self._table: dict[str, tuple[float, str]] = {}
        for row in _checked(_read(config.path), config):
            key = content_id(str(row[config.prompt_column]), str(row[config.response_column]))
            rationale = str(row.get(config.rationale_column) or "") if config.rationale_column else ""
            self._table.setdefault(key, (_number(row[config.score_column]), rationale))
        if not self._table:
            raise DataError(f"oracle.path {config.path} holds no judgements")
        self.name = f"replay:{config.path.rstrip('/').rpartition('/')[2]}"

    def check(self) -> None:
        """Nothing left to check: the table was read."""

    def estimate_usd(self, prompt: str, response: str) -> float:
        return 0.0

    async def judge(self, prompt: str, response: str) -> Verdict:
        score, rationale = self._table.get(content_id(prompt, response), (None, "not in the table"))
        if score is None:
            return Verdict(score=None, rationale=rationale, billed=False)
        if not self._rubric.accepts(score):
            scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
            return Verdict(score=None, rationale=f"not a score from {scale}: {score}", billed=False)
        return Verdict(score=score, rationale=rationale)


def _read(path: str) -> list[dict[str, Any]]:
    """Rows of a JSONL, JSON, CSV or Parquet file, gzip'd or not, on any filesystem."""
    try:
        filesystem, place = fsspec.url_to_fs(path)
        content: bytes = filesystem.cat_file(place)
    except OSError as error:
        raise DataError(f"oracle.path must be a file of judgements, got {path}: {error}") from None
    suffix = path.removesuffix(".gz").rpartition(".")[2]
    try:
        content = gzip.decompress(content) if path.endswith(".gz") else content
        match suffix:
            case "jsonl":
                return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
            case "json":
                return json.loads(content)
            case "csv":
                return list(csv.DictReader(io.StringIO(content.decode(), newline="")))
            case "parquet":
                return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (ValueError, OSError, EOFError, csv.Error) as error:  # Arrow's and JSON's errors are ValueErrors
        raise DataError(f"oracle.path {path} is not a readable {suffix} file: {error}") from None
    raise DataError(f"oracle.path must end in .jsonl, .json, .csv or .parquet, or in one of these and .gz; got {path}")


def _checked(rows: Any, config: ReplayOracleConfig) -> Iterable[dict[str, Any]]:
    wanted = [config.prompt_column, config.response_column, config.score_column]
    if config.rationale_column is not None:
        wanted.append(config.rationale_column)
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if column not in row]
        if missing:
            there = ", ".join(map(str, row)) or "none"
            raise DataError(f"oracle.path {config.path}, row {number}: no column {missing[0]}; there are: {there}")
        yield row


def _number(cell: Any) -> float:
    """A score cell; an empty or unreadable one is NaN, which is on no scale."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
