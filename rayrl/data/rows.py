"""Rows of JSONL, JSON, CSV and Parquet files (gzip'd too), `save_to_disk` folders and hub data sets.

Rows stream in batches, from local paths and fsspec URLs alike, so that memory does not grow with the file;
only a JSON file that is one list is read whole. This module knows no column's meaning: `reading` and `pairs` do.
"""

import codecs
import csv
import difflib
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.errors import DataError

SourceRow = dict[str, object]
"""A row of a user's file or data set: cells of any type, by column."""
Reader = Callable[[IO[bytes], str], Iterator[SourceRow]]
"""Reads the rows of an open file; the path is for messages."""

PEEKED_ROWS = 20
"""Rows that tell the columns of a source: JSON rows may leave a column out, so one row is not enough."""
BATCH_ROWS = 1024
SHOWN_CHARACTERS = 80
"""Of a row or cell, in messages."""
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowInvalid)


def read_rows(path: str, split: str = "train") -> Iterator[SourceRow]:
    """Yield all rows of a file, folder or hub data set; `split` matters for the last two.

    Args:
        path: a local path, an fsspec URL, or a hub name (`name:configuration` if it has several).
        split: the split of a data set.

    Raises:
        DataError: the path leads nowhere, or the file does not have the format of its name.
    """
    stem = path.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in READERS if stem.endswith(suffix)), None)
    is_url = "://" in path
    is_folder = not is_url and Path(path).expanduser().is_dir()
    looks_like_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path) is not None
    # A folder goes first, whatever its name: a data set may be saved under a name with a suffix.
    if is_folder:
        yield from _saved_rows(path, split)
    elif suffix is not None:
        yield from _file_rows(path, READERS[suffix])
    elif looks_like_hub_name and not Path(path).exists():
        yield from _hub_rows(path, split)
    elif is_url:
        yield from _saved_rows(path, split)
    else:
        raise DataError(f"{path} must end in one of {', '.join(READERS)} (.gz may follow), or be a save_to_disk folder")


def require_columns(path: str, needed: list[str], split: str = "train") -> None:
    """Refuse a source that is missing, empty, malformed at its beginning, or lacks a column.

    Raises:
        DataError: names the column, and the columns that exist.
    """
    next(rows_with(path, split, needed))


def rows_with(path: str, split: str, needed: list[str]) -> Iterator[SourceRow]:
    """Yield the rows like `read_rows`, after a check of the first ones: never none, and with every needed column.

    Raises:
        DataError: see `require_columns`.
    """
    rows = read_rows(path, split)
    first_rows = list(itertools.islice(rows, PEEKED_ROWS))
    if not first_rows:
        raise DataError(f"{path} is empty: at least one row is needed")
    columns: list[str] = []
    for row in first_rows:
        columns += [column for column in row if column not in columns]
    for column in needed:
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{path} has no column {column}; the columns there are {', '.join(columns)}{hint}")
    yield from first_rows
    yield from rows


def _file_rows(path: str, reader: Reader) -> Iterator[SourceRow]:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield from reader(cast("IO[bytes]", file), path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: {error}") from None
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json_line_rows(file: IO[bytes], path: str) -> Iterator[SourceRow]:
    for number, line in enumerate(file, 1):
        # A byte order mark stands at the beginning of a file only.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be a JSON object, got {text[:SHOWN_CHARACTERS]}")
        yield cast("SourceRow", row)


def _json_rows(file: IO[bytes], path: str) -> Iterator[SourceRow]:
    beginning = file.read(64)
    file.seek(0)
    # JSON lines are often named .json: only a file that begins with a list is one JSON document.
    if not beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_line_rows(file, path)
        return
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number} must be a JSON object, got {str(row)[:SHOWN_CHARACTERS]}")
        yield cast("SourceRow", row)


def _csv_rows(file: IO[bytes], path: str) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a text of more than 128 KiB
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    # Cells beyond the header are gathered under the key "", which no column has.
    reader = csv.DictReader(lines, restkey="", strict=True)
    for row in reader:
        if "" in row:
            raise DataError(f"{path}, line {reader.line_num} has more cells than the header")
        yield cast("SourceRow", row)


def _parquet_rows(file: IO[bytes], path: str) -> Iterator[SourceRow]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
        yield from batch.to_pylist()


READERS: dict[str, Reader] = {
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""Readers by the suffix of a file, before ".gz"."""


def _saved_rows(path: str, split: str) -> Iterator[SourceRow]:
    import datasets  # a second of import that files do without

    try:
        saved = datasets.load_from_disk(path)
    except OSError as error:
        raise DataError(f"{path} is no folder written by save_to_disk: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path} has no split {split}; the splits there are {', '.join(map(str, saved))}")
        saved = saved[split]
    for row in saved:
        yield cast("SourceRow", row)


def _hub_rows(path: str, split: str) -> Iterator[SourceRow]:
    import datasets

    name, _, configuration = path.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no local file or folder, and loading split {split} from the hub failed ({error}); "
            "correct the path, or download the data set and give its file or folder"
        ) from None
    for row in table:
        yield cast("SourceRow", row)
