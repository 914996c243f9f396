"""Results of cells: one small Parquet file each, named by the hash of all that decides it; and the table of a study."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.records import Record, from_table, to_table
from rayrl.runs import storage
from rayrl.study.config import Point, StudyConfig

logger = logging.getLogger(__name__)

CELLS, RESULTS = "cells", "results.parquet"
GOLD = "gold"
"""Of the names of files with gold scores along PPO."""
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measure of one cell."""

    measure: str
    mean: float
    standard_error: float
    """Over prompts; infinite of a single one, NaN of a measure that has none, as a count."""
    num: int
    """Prompts behind it."""
    prompt_ids: list[str] = field(default_factory=list[str])
    """Of the values; empty where the measure is not one of single prompts."""
    values: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldPoint:
    """A policy along the PPO of a cell, as the gold expert scores its answers to held-out prompts."""

    step: int
    """Rollouts that it learnt from; 0 is M1."""
    kl: float
    """To M1, nats per response."""
    score: float
    """Mean over prompts; NaN where the expert scored nothing."""
    reward: float
    """Mean reward that the PPO gave to the same answers, in its own unit; NaN where it gave none."""
    gain: float
    """Mean difference from M1's score on the same prompts."""
    standard_error: float
    """Of the gain, over prompts; infinite of a single one."""
    num: int
    """Prompts behind the gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a study."""

    arm: str
    """Strategy, variant or control."""
    budget: int
    """Labels; 0 of a control that reads none."""
    seed: int
    point: Point = ()
    """Of the grid."""

    @property
    def title(self) -> str:
        """Name it in messages."""
        settings = "".join(f", {name} = {value!r}" for name, value in self.point)
        return f"{self.arm}, {self.budget} labels, seed {self.seed}{settings}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a cell."""

    cell: Cell
    key: str
    """Names all that decides its result."""
    measured: Sequence[Measured] = ()
    gold: Sequence[GoldPoint] = ()
    """Along its PPO; empty where the study asks for none, or the cell's policy has no PPO."""
    failure: str = ""
    """Why it has no result."""
    seconds: float = 0.0
    """Of this start; 0 where the result was known."""

    def by_name(self) -> dict[str, Measured]:
        """Return its measures by name."""
        return {each.measure: each for each in self.measured}


def estimated(measure: str, values: dict[str, float]) -> Measured:
    """Make a measure of its values by prompt.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError(f"{measure} needs a prompt with two responses that the oracle tells apart, and found none")
    numbers = list(values.values())
    mean = math.fsum(numbers) / len(numbers)
    squares = math.fsum((number - mean) ** 2 for number in numbers)
    error = math.sqrt(squares / (len(numbers) - 1) / len(numbers)) if len(numbers) > 1 else math.inf
    return Measured(
        measure=measure, mean=mean, standard_error=error, num=len(numbers), prompt_ids=list(values), values=numbers
    )


def counted(measure: str, number: float) -> Measured:
    """Make a measure of a count, or of another number that has no error over prompts."""
    return Measured(measure=measure, mean=number, standard_error=math.nan, num=1)


def result_place(study_dir: str, key: str) -> str:
    """Locate the result of a cell."""
    return storage.join(storage.absolute(study_dir), CELLS, f"{key}.parquet")


def read_result(study_dir: str, key: str) -> list[Measured] | None:
    """Read the result of a cell; None if there is none that can be read."""
    return _read(result_place(study_dir, key), Measured)


def write_result(study_dir: str, key: str, measured: Sequence[Measured]) -> None:
    """Keep the result of a cell, whole or not at all."""
    storage.write_bytes(result_place(study_dir, key), _parquet(to_table(measured, Measured)))


def read_gold(study_dir: str, key: str) -> list[GoldPoint] | None:
    """Read the gold scores along the PPO of a cell; None if there are none that can be read."""
    return _read(result_place(study_dir, f"{key}-{GOLD}"), GoldPoint)


def write_gold(study_dir: str, key: str, points: Sequence[GoldPoint]) -> None:
    """Keep the gold scores along the PPO of a cell, whole or not at all."""
    storage.write_bytes(result_place(study_dir, f"{key}-{GOLD}"), _parquet(to_table(points, GoldPoint)))


def _read(place: str, record: type[R]) -> list[R] | None:
    if not storage.exists(place):
        return None
    try:
        return from_table(pq.read_table(io.BytesIO(storage.read_bytes(place))), record)
    except (pa.ArrowException, TypeError) as error:
        logger.warning("%s is damaged, or of another version, and is made again: %s", place, error)
        return None


def results_table(study: StudyConfig, outcomes: Sequence[Outcome]) -> pa.Table:
    """Make the table of a study: a row per cell and measure, and one per failed cell."""
    columns = ["study", "kind", "arm", "budget", "seed", *study.factors]
    columns += ["measure", "mean", "standard_error", "num", "state", "reason", "key"]
    rows: list[dict[str, object]] = []
    for outcome in outcomes:
        cell = outcome.cell
        facts: dict[str, object] = {"study": study.name, "kind": study.kind, "arm": cell.arm}
        facts |= {"budget": cell.budget, "seed": cell.seed}
        facts |= {setting: json.dumps(value) for setting, value in cell.point} | {"key": outcome.key}
        if outcome.failure:
            rows.append(facts | {"state": "failed", "reason": outcome.failure})
        for each in outcome.measured:
            numbers = {"mean": each.mean, "standard_error": each.standard_error, "num": each.num}
            rows.append(facts | numbers | {"measure": each.measure, "state": "done", "reason": ""})
    schema = pa.schema([pa.field(name, _type_of(name)) for name in columns])
    return pa.Table.from_pylist(rows, schema=schema)


def write_results(study: StudyConfig, outcomes: Sequence[Outcome]) -> str:
    """Write the table of a study; return its place."""
    place = storage.join(storage.absolute(study.study_dir), RESULTS)
    storage.write_bytes(place, _parquet(results_table(study, outcomes)))
    return place


def write_gold_table(study: StudyConfig, outcomes: Sequence[Outcome]) -> str | None:
    """Write a row per cell and point along its PPO; return the place of the table, or None if there is none."""
    rows: list[dict[str, object]] = []
    for outcome in outcomes:
        cell = outcome.cell
        facts: dict[str, object] = {"arm": cell.arm, "budget": cell.budget, "seed": cell.seed}
        facts |= {setting: json.dumps(value) for setting, value in cell.point}
        rows += [facts | asdict(point) for point in outcome.gold]
    if not rows:
        return None
    place = storage.join(storage.absolute(study.study_dir), f"{GOLD}.parquet")
    storage.write_bytes(place, _parquet(pa.Table.from_pylist(rows)))
    return place


def _type_of(column: str) -> pa.DataType:
    if column in ("budget", "seed", "num"):
        return pa.int64()
    return pa.float64() if column in ("mean", "standard_error") else pa.string()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
