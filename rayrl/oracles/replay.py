"""Tables of earlier judgements and comparisons as the expert: reruns without paying, experiments on published ones."""

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
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.records import content_id

_NOT_THERE = Verdict(score=None, rationale="not in the table", billed=False)


class ReplayOracle:
    """Answers from tables; what they do not hold, or hold without a usable answer, abstains unbilled.

    Of several rows about the same response the first counts; of several about the same two responses the first in
    the order asked for, and else the first in the other order, turned around.
    """

    def __init__(self, config: ReplayOracleConfig, rubric: Rubric) -> None:
        self._rubric = rubric
        self._scores: dict[str, tuple[float, str]] = {}
        self._shares: dict[str, tuple[float, str]] = {}
        self.name = f"replay:{_file_name(config.path)}"
        self.comparer = f"replay:{_file_name(config.comparisons_path)}"
        if config.path is not None:
            self._read_judgements(config, config.path)
        if config.comparisons_path is not None:
            self._read_comparisons(config, config.comparisons_path)

    def check(self) -> None:
        """Nothing left to check: the tables were read."""

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float:
        return 0.0

    async def judge(self, prompt: str, response: str) -> Verdict:
        if (found := self._scores.get(content_id(prompt, response))) is None:
            return _NOT_THERE
        score, rationale = found
        if not self._rubric.accepts(score):
            scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
            return Verdict(score=None, rationale=f"not a score from {scale}: {score}", billed=False)
        return Verdict(score=score, rationale=rationale)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        if (found := self._shares.get(content_id(prompt, first, second))) is not None:
            return Verdict(score=found[0], rationale=found[1])
        if (found := self._shares.get(content_id(prompt, second, first))) is not None:
            return Verdict(score=1.0 - found[0], rationale=found[1])
        return _NOT_THERE

    def _read_judgements(self, config: ReplayOracleConfig, path: str) -> None:
        for row in _rows(path, config.judgement_columns, "oracle.path"):
            key = content_id(str(row[config.prompt_column]), str(row[config.response_column]))
            self._scores.setdefault(key, (_number(row[config.score_column]), _rationale(row, config)))
        if not self._scores:
            raise DataError(f"oracle.path {path} holds no judgements")

    def _read_comparisons(self, config: ReplayOracleConfig, path: str) -> None:
        """Rows whose preference is none of the three words are not there."""
        columns = config.comparison_columns
        for row in _rows(path, columns, "oracle.comparisons_path"):
            prompt, first, second, preference = (str(row[column]) for column in columns[:4])
            for word, share in PREFERENCE_SHARES.items():
                if preference.strip().lower() == word:
                    self._shares.setdefault(content_id(prompt, first, second), (share, _rationale(row, config)))
        if not self._shares:
            words = '"first", "second" or "tie"'
            raise DataError(
                f"oracle.comparisons_path {path} must say {words} in column {config.preference_column}, and no row does"
            )


def _file_name(path: str | None) -> str:
    return (path or "none").rstrip("/").rpartition("/")[2]


def _rationale(row: dict[str, Any], config: ReplayOracleConfig) -> str:
    return str(row.get(config.rationale_column) or "") if config.rationale_column else ""


def _rows(path: str, needed: list[str], setting: str) -> Iterable[dict[str, Any]]:
    for number, row in enumerate(_read(path, setting), start=1):
        missing = [column for column in needed if column not in row]
        if missing:
            there = ", ".join(map(str, row)) or "none"
            raise DataError(f"{setting} {path}, row {number}: no column {missing[0]}; there are: {there}")
        yield row


def _read(path: str, setting: str) -> list[dict[str, Any]]:
    """Rows of a JSONL, JSON, CSV or Parquet file, gzip'd or not, on any filesystem."""
    try:
        filesystem, place = fsspec.url_to_fs(path)
        content: bytes = filesystem.cat_file(place)
    except OSError as error:
        raise DataError(f"{setting} must be a file, got {path}: {error}") from None
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
        raise DataError(f"{setting} {path} is not a readable {suffix} file: {error}") from None
    raise DataError(f"{setting} must end in .jsonl, .json, .csv or .parquet, or in one of these and .gz; got {path}")


def _number(cell: Any) -> float:
    """A score cell; an empty or unreadable one is NaN, which is on no scale."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
