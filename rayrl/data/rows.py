"""Rows of JSONL, JSON, CSV and Parquet files (gzip'd too), `save_to_disk` folders and hub data sets.

Rows stream in batches, from local paths and fsspec URLs alike, so that memory does not grow with the file;
only a JSON file that is one list is read whole. What the columns mean is `reading`'s business.
"""

import csv
import difflib
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.errors import DataError

Row = dict[str, Any]

_PEEKED_ROWS = 20  # JSON rows may leave a column out, so one row does not tell which columns there are
_BATCH_ROWS = 1024
_UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowInvalid)


def read_rows(path: str, split: str = "train") -> Iterator[Row]:
    """All rows of a file, folder or hub data set; `split` matters for the last two.

    Args:
        path: a local path, an fsspec URL, or a hub name (`name:configuration` if it has several).
        split: the split of a data set.

    Raises:
        DataError: nothing is there, or it is not what its name says.
    """
    stem = path.lower().removesuffix(".gz")
    suffix = next((s for s in _READERS if stem.endswith(s)), None)
    if "://" not in path and Path(path).expanduser().is_dir():
        yield from _saved_rows(path, split)
    elif suffix is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path) and not Path(path).exists():
        yield from _hub_rows(path, split)
    elif suffix is None and "://" in path:
        yield from _saved_rows(path, split)
    elif suffix is None:
        raise DataError(
            f"{path} must end in one of {', '.join(_READERS)} (.gz may follow), or be a save_to_disk folder"
        )
    else:
        yield from _file_rows(path, _READERS[suffix])


def require_columns(path: str, needed: list[str], split: str = "train") -> None:
    """Refuse a source that is missing, empty, malformed at its beginning, or lacks a column.

    Raises:
        DataError: names the column, and the columns there are.
    """
    next(rows_with(path, split, needed))


def rows_with(path: str, split: str, needed: list[str]) -> Iterator[Row]:
    """`read_rows`, after a look at the first rows: never empty, and with every needed column.

    Raises:
        DataError: see `require_columns`.
    """
    rows = read_rows(path, split)
    head = list(itertools.islice(rows, _PEEKED_ROWS))
    if not head:
        raise DataError(f"{path} is empty: at least one row is needed")
    columns = list(dict.fromkeys(key for row in head for key in row))
    for column in needed:
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{path} has no column {column}; the columns there are {', '.join(columns)}{hint}")
    yield from itertools.chain(head, rows)


def _file_rows(path: str, reader: Callable[[IO[bytes], str], Iterator[Row]]) -> Iterator[Row]:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield from reader(file, path)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: {error}") from None
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json_line_rows(file: IO[bytes], path: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be a JSON object, got {text[:80]}")
        yield row


def _json_rows(file: IO[bytes], path: str) -> Iterator[Row]:
    head = file.read(64)
    file.seek(0)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_line_rows(file, path)  # JSON lines are often named .json
        return
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number} must be a JSON object, got {str(row)[:80]}")
        yield row


def _csv_rows(file: IO[bytes], path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a text of more than 128 KiB
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    reader = csv.DictReader(lines, restkey="", strict=True)
    for row in reader:
        if "" in row:
            raise DataError(f"{path}, line {reader.line_num} has more cells than the header")
        yield row


def _parquet_rows(file: IO[bytes], path: str) -> Iterator[Row]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
        yield from batch.to_pylist()


_READERS = {".jsonl": _json_line_rows, ".ndjson": _json_line_rows, ".json": _json_rows, ".csv": _csv_rows}
_READERS[".parquet"] = _parquet_rows


def _saved_rows(path: str, split: str) -> Iterator[Row]:
    import datasets  # a second of import that files do without

    try:
        saved = datasets.load_from_disk(path)
    except OSError as error:
        raise DataError(f"{path} is no folder written by save_to_disk: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path} has no split {split}; the splits there are {', '.join(map(str, saved))}")
        saved = saved[split]
    yield from saved  # type: ignore[misc]


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, configuration = path.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no local file or folder, and loading split {split} from the hub failed ({error}); "
            "correct the path, or download the data set and give its file or folder"
        ) from None
    yield from table  # type: ignore[misc]
