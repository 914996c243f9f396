"""Rows of CSV files in any dialect: the separator, and how a quotation mark in a cell is written, are found out.

Python's own parser reads them, since it names the line of a fault; pandas and Arrow take words such as "null" for empty
cells, and drop or fill rows whose cells do not match the header.
"""

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rayrl.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

SEPARATORS = (",", ";", "\t", "|")
MAX_CELL_CHARACTERS = 1 << 26
"""Longest cell: a quotation mark that never closes must not take the rest of a large file into memory."""
_SAMPLE_CHARACTERS = 1 << 16
NAMED_SEPARATOR = re.compile(r"sep=([^\r\n])[^\S\r\n]*(\r\n?|\n)", re.IGNORECASE)
"""First line by which a file names its separator."""
_ESCAPED_MARK = re.compile(r'(?<!\\)((?:\\\\)*)\\"')
"""A quotation mark behind a backslash that is not behind another one."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The way in which a file writes its cells."""

    separator: str
    escapes_marks: bool = False
    """Whether a backslash stands before a quotation mark inside a quoted cell, where others double the mark. Any other
    backslash is text."""
    skips_space: bool = False
    """Whether a space behind a separator is no part of the cell."""

    def reader(self, lines: Iterable[str]) -> "Reader":
        """Parse lines, and raise at a quotation mark in a wrong place."""
        # Only the marks are written anew: an escape character of the parser would take every backslash for one, and
        # accept marks in wrong places.
        if self.escapes_marks:
            lines = (_ESCAPED_MARK.sub(r'\1""', line) for line in lines)
        return csv.reader(lines, delimiter=self.separator, skipinitialspace=self.skips_space, strict=True)


def csv_rows(
    file: io.TextIOWrapper,
    path: str,
    needed: Sequence[str] | None,
    extra: Sequence[str],
    check_columns: Callable[[list[str]], None],
    *,
    is_tsv: bool,
) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Yield the first line of every row, with its cells in the needed and extra columns, or with its fault.

    Args:
        file: the text, with its line breaks as they are (`newline=""`).
        path: for messages.
        needed: columns; None is all of them.
        extra: columns that are read too where they are.
        check_columns: refuses the columns of the file.
        is_tsv: whether a tab is the likeliest separator.

    Raises:
        DataError: a quotation mark is in a wrong place, or never closes.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    sample = file.read(_SAMPLE_CHARACTERS) + file.readline()
    num_skipped, separator = 0, None
    # A first line of this kind is Excel's.
    if named := NAMED_SEPARATOR.match(sample):
        num_skipped, separator = 1, named[1]
        sample = sample[named.end() :]
    dialect = find_dialect(sample, needed or (), ("\t", *SEPARATORS) if is_tsv else SEPARATORS, separator)
    reader = dialect.reader(itertools.chain(io.StringIO(sample, newline=""), file))
    line = 1 + num_skipped
    try:
        columns = [name.strip() for name in _read_header(reader)]
        if columns:
            check_columns(columns)
        wanted = {
            place: name
            for place, name in enumerate(columns)
            if name and (needed is None or name in needed or name in extra)
        }
        while True:
            line = reader.line_num + 1 + num_skipped
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue  # an empty line
            num_more = len(cells) - len(columns)
            if num_more < 0 or any(cells[len(columns) :]):
                yield line, _wrong_number(cells, len(columns), dialect.separator)
            else:
                yield line, {name: cells[place] for place, name in wanted.items()}
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: the row that begins here breaks the rules of CSV ({_reason(error)}): a cell that "
            "begins with a quotation mark must end with one, before the next separator or the end of the line, and "
            "marks inside of it must be doubled; correct that row"
        ) from None


def _reason(error: csv.Error) -> str:
    if "unexpected end of data" in str(error) or "field limit" in str(error):
        return "its quotation mark never closes"
    return str(error)


def _wrong_number(cells: list[str], num_columns: int, separator: str) -> str:
    more = "more" if len(cells) > num_columns else "fewer"
    if any(re.match(r' +"', cell) for cell in cells):
        remedy = "no space may stand before the quotation mark that opens a cell"
    elif len(cells) > num_columns:
        remedy = f"a cell that holds the separator {separator!r} must stand in quotation marks"
    else:
        remedy = f"write all of its cells, also the empty ones, with the separator {separator!r} between them"
    return f"it has {more} cells than the header, {len(cells)} for {num_columns} columns; {remedy}"


def _read_header(reader: "Reader") -> list[str]:
    """Read the first line that is not blank."""
    return next((cells for cells in reader if any(map(str.strip, cells))), [])


def find_dialect(
    sample: str, needed: Sequence[str], separators: Sequence[str], separator: str | None = None
) -> Dialect:
    """Find the dialect under which the sample's header has most of the needed columns, and its rows break least.

    Args:
        sample: beginning of the file, in whole lines.
        needed: columns that the header should have.
        separators: in the order of preference.
        separator: the one that the file names itself.
    """
    # A separator that the header lacks separates nothing: rows of one column that hold it are refused.
    first_line = re.split(r"[\r\n]", sample.lstrip("\r\n "), maxsplit=1)[0]
    found = [each for each in separators if each in first_line] or separators[:1]
    candidates = [
        Dialect(separator=each, escapes_marks=escapes_marks)
        for each in ([separator] if separator else found)
        for escapes_marks in ((False, True) if '\\"' in sample else (False,))
    ]
    # The first of equals counts; where no separator gives a needed column, the one with most columns makes the
    # clearest message.
    best = max(candidates, key=lambda dialect: _fitness(sample, dialect, needed))
    header = _header(sample, best)
    skips_space = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return replace(best, skips_space=skips_space)


def _header(sample: str, dialect: Dialect) -> list[str]:
    try:
        return _read_header(dialect.reader(io.StringIO(sample, newline="")))
    except csv.Error:
        return []


def _fitness(sample: str, dialect: Dialect, needed: Sequence[str]) -> tuple[int, int, int]:
    """Return (needed columns in the header, less the rows that break, columns if none is needed)."""
    header = [name.strip() for name in _header(sample, dialect)]
    num_found = sum(name in header for name in needed)
    num_broken = 0
    reader = dialect.reader(io.StringIO(sample, newline=""))
    try:
        for cells in reader:
            num_broken += bool(cells) and len(cells) != len(header)
    except csv.Error as error:
        # The sample may end inside a cell. Of dialects that all break, that of the latest line names the true fault.
        num_broken += 0 if "unexpected end of data" in str(error) else 2 * len(sample) - reader.line_num
    return num_found, -num_broken, len(header) if num_found == 0 else 0
