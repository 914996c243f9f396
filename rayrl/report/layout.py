"""Building blocks of the report's page: tiles, tables, figures and sections, as text that is not HTML yet.

The template turns each into HTML and escapes every string.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from rayrl.algorithms.estimate import Estimate
from rayrl.report.formats import NOT_RUN, is_above, is_known, number, plus_minus

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline number."""

    value: str
    title: str
    state: Literal["", "good", "unsure", "none"] = ""
    """Color: better than no change by two standard errors, not better, or not known."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; numbers stand on the right."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    """The first so many columns are text, and stand on the left."""
    has_wide_names: bool = False
    """Names in the first column are not broken into lines."""


@dataclass(frozen=True, kw_only=True)
class FigureCard:
    """A figure; one that a run has no data for is "not run"."""

    kind: ClassVar[str] = "figure"
    name: str
    """Of `rayrl.report.figures`."""
    title: str
    note: str = ""
    is_final: bool = False
    """Its stage is over: without data it is left out."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A sentence where a figure or a table would be."""

    kind: ClassVar[str] = "remark"
    text: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that a reader must not miss."""

    kind: ClassVar[str] = "notice"
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Text over the whole width; a note is smaller."""

    kind: ClassVar[str] = "paragraph"
    text: str
    is_note: bool = True


Card = Table | FigureCard | Remark


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cards beside each other."""

    kind: ClassVar[str] = "grid"
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a title."""

    title: str
    parts: Sequence[Card | Notice | Paragraph | Grid]


def estimate_tile(
    estimate: Estimate | None, title: str, *, no_change: float = 0.0, signed: bool = False, percent: bool = False
) -> Tile:
    """Make the tile of an estimate, colored by whether it is more than two standard errors above no change."""
    value = plus_minus(estimate, signed=signed, percent=percent)
    if estimate is None or not is_known(estimate):
        return Tile(value=value, title=title, state="none")
    state = "good" if is_above(estimate, no_change) else "unsure"
    return Tile(value=value, title=f"{title}, n = {estimate.num}", state=state)


def number_of(
    metrics: M | None, measure: Callable[[M], float | None], pattern: str = ",.0f", *, missing: str = "-"
) -> str:
    """Write a number of some metrics into a table.

    Args:
        metrics: None where their stage has not finished.
        measure: reads the number; None where it was not measured.
        pattern: format of the number.
        missing: written where it was not measured.
    """
    return NOT_RUN if metrics is None else number(measure(metrics), pattern, missing=missing)


def estimate_of(
    metrics: M | None, measure: Callable[[M], Estimate | None], *, signed: bool = False, percent: bool = False
) -> str:
    """Write an estimate of some metrics into a table; None where their stage has not finished."""
    return NOT_RUN if metrics is None else plus_minus(measure(metrics), signed=signed, percent=percent)
