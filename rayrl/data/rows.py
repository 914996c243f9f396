"""Rows of files, folders of shards, `save_to_disk` folders and hub data sets, with only the columns that are used.

Rows stream in batches, from local paths and fsspec URLs alike, so that memory does not grow with the file. `files`
finds and opens the files, `json_rows` and `csv_rows` parse text, pyarrow the rest, and `datasets` what it wrote or
downloads.
This module knows no column's meaning: `reading` and `pairs` do.
"""

import difflib
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from lzma import LZMAError
from typing import TYPE_CHECKING, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.data import files
from rayrl.data.csv_rows import csv_rows
from rayrl.data.files import OpenFile
from rayrl.data.json_rows import Ambiguous, json_rows
from rayrl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SourceRow = dict[str, object]
"""Cells of a row of a user's file or data set, of any type, by column."""

BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 16
_UNREADABLE = (OSError, EOFError, LZMAError, zlib.error, pa.ArrowException)
_WITHOUT_PARTS = ("support range requests", "Cannot seek streaming")
"""Words of fsspec's errors about a web server that gives whole files alone."""
_UNCONVERTIBLE = (ValueError, OverflowError, pa.ArrowException)


class Row(NamedTuple):
    """A row of a source."""

    where: str
    """Names its file, number and line, for messages."""
    number: int
    """Its number in the source, from 1; rows that cannot be read count."""
    content: SourceRow | str
    """Its cells, or why it cannot be read."""

    @property
    def cells(self) -> SourceRow:
        """Its cells.

        Raises:
            DataError: it cannot be read.
        """
        if isinstance(self.content, str):
            raise DataError(f"{self.where}: {self.content}")
        return self.content


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Columns that are not used, and in how many rows they hold something; filled while a source is read.

    Wide columns are not read for it: of Parquet, the file's statistics count, which may count an empty text.
    """

    columns: Sequence[str] = ()
    num_rows: Counter[str] = field(default_factory=Counter[str])

    def add(self, column: str, num_rows: int) -> None:
        """Count rows of a column that hold something."""
        if num_rows:
            self.num_rows[column] += num_rows


def read_rows(
    path: str,
    needed: Sequence[str] | None = None,
    *,
    optional: Sequence[str] = (),
    split: str = "train",
    encoding: str = "utf-8",
    watch: Watch | None = None,
) -> Iterator[Row]:
    """Yield all rows of a file, pattern, folder or hub data set.

    Args:
        path: a local path, an fsspec URL, a pattern of either, or a hub name (`name:configuration` if it has several).
        needed: columns to read, which each file must have; None reads all of them.
        optional: columns to read too, from the files that have them.
        split: the split of a folder or hub data set.
        encoding: of text files.
        watch: columns to count beside the needed ones.

    Raises:
        DataError: the path leads nowhere, a file does not have the format of its name, or a column is missing; or
            there is no row at all.
    """
    source = _Source(needed=needed, optional=optional, encoding=encoding, watch=watch or Watch())
    number = 0
    for row in _all_rows(path, split, source):
        number += 1
        yield row if row.number == number else row._replace(number=number)
    if number == 0:
        raise DataError(f"{path} is empty: at least one row is needed")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is asked of every file of a source."""

    needed: Sequence[str] | None
    optional: Sequence[str]
    encoding: str
    watch: Watch

    def check_columns(self, path: str) -> Callable[[list[str]], None]:
        """Return the check of a file's columns."""
        return lambda columns: _check_columns(path, self.needed or (), self.optional, columns)

    def wanted(self, path: str, columns: list[str]) -> list[str]:
        """Return those of a file's columns that are read."""
        _check_columns(path, self.needed or (), self.optional, columns)
        if self.needed is None:
            return columns
        return list(dict.fromkeys((*self.needed, *(name for name in self.optional if name in columns))))

    def without_twins(self, row: Ambiguous) -> SourceRow | str:
        """Return the row, or its fault if a column that is read is there twice."""
        twice = row.twice if self.needed is None else row.twice.intersection((*self.needed, *self.optional))
        return f"it has the key {min(twice)} twice; remove all but one of them" if twice else row

    def watched(self, columns: list[str]) -> list[str]:
        return [name for name in self.watch.columns if name in columns]


def _check_columns(path: str, needed: Sequence[str], optional: Sequence[str], columns: list[str]) -> None:
    """Refuse a file that lacks a needed column, or has one that is read twice.

    Raises:
        DataError: names the column, and for one that is missing the columns that exist.
    """
    for column in needed:
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{path} has no column {column}; the columns there are {', '.join(columns)}{hint}")
    for column in (*needed, *optional):
        if columns.count(column) > 1:
            raise DataError(f"{path} has {columns.count(column)} columns named {column}; rename all but one of them")


def _all_rows(path: str, split: str, source: _Source) -> Iterator[Row]:
    found = files.find_files(path)
    if found is None:
        if files.is_on_hub(path):
            yield from _data_set_rows(_from_hub(path, split), path, source)
            return
        if files.is_saved(path):
            yield from _data_set_rows(_saved(path, split), path, source)
            return
        found = files.shards_in(path, split)
    for file in found:
        yield from _file_rows(file, source)


def _file_rows(path: str, source: _Source) -> Iterator[Row]:
    try:
        with files.open_file(path) as file:
            rows = _text_rows if file.format in ("json", "csv", "tsv") else _columnar_rows
            yield from rows(file, path, source)
    except UnicodeError as error:
        raise files.refused_text(path, source.encoding, error) from None
    except DataError:
        raise
    except Exception as error:
        if any(words in str(error) for words in _WITHOUT_PARTS):
            raise DataError(
                f"{path} needs a server that gives parts of a file, and this one does not; download it first, and give "
                "the file"
            ) from None
        # Filesystems behind a URL have errors of their own.
        if "://" not in path and not isinstance(error, _UNREADABLE):
            raise
        raise DataError(f"{path} cannot be read: {error}") from None


def _text_rows(file: OpenFile, path: str, source: _Source) -> Iterator[Row]:
    check_columns = source.check_columns(path)
    watched = frozenset(source.watch.columns)
    # JSON may hold all line breaks but the line feed, and CSV any.
    with files.as_text(file.content, path, source.encoding, newline="\n" if file.format == "json" else "") as text:
        if file.format == "json":
            rows = json_rows(text, path, source.needed, check_columns)
        else:
            extra = (*source.optional, *source.watch.columns)
            rows = csv_rows(text, path, source.needed, extra, check_columns, is_tsv=file.format == "tsv")
        for number, (line, content) in enumerate(rows, 1):
            if isinstance(content, Ambiguous):
                content = source.without_twins(content)
            if watched and not isinstance(content, str):
                source.watch.num_rows.update(name for name in watched & content.keys() if content[name])
            where = f"{path}, row {number}" if line in (number, None) else f"{path}, row {number} (line {line})"
            yield Row(where, number, content)


def _columnar_rows(file: OpenFile, path: str, source: _Source) -> Iterator[Row]:
    with _at_any_place(file, path) as seekable:
        batches = _parquet_batches if file.format == "parquet" else _arrow_batches
        yield from _rows_of_batches(batches(seekable, path, source), path)


@contextmanager
def _at_any_place(file: OpenFile, path: str) -> Iterator[pa.NativeFile]:
    """Open a file of Parquet or Arrow so that it can be read at any place: a compressed one is unpacked first."""
    if file.is_compressed:
        with tempfile.NamedTemporaryFile() as unpacked:
            shutil.copyfileobj(file.content, unpacked)
            unpacked.flush()
            with pa.memory_map(unpacked.name) as mapped:
                yield mapped
    elif file.format == "arrow" and os.path.isfile(path):
        # A batch of Arrow may be as large as the file; of a mapped one only what is used is read.
        with pa.memory_map(path) as mapped:
            yield mapped
    else:
        yield pa.PythonFile(file.content, "r")


def _parquet_batches(file: pa.NativeFile, path: str, source: _Source) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    columns = source.wanted(path, table.schema_arrow.names)
    for name in source.watched(table.schema_arrow.names):
        if not _holds_nulls_alone(table.schema_arrow.field(name).type):
            source.watch.add(name, _num_filled(table.metadata, name))
    yield from table.iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _holds_nulls_alone(kind: pa.DataType) -> bool:
    """Return whether a column has no values, or only lists without any; it has no statistics."""
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def _num_filled(metadata: pq.FileMetaData, name: str) -> int:
    """Count the rows in which a column holds something, at most; without statistics, all."""
    num_filled = 0
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        num_values = 0
        # The leaves of a nested column are columns of their own.
        for leaf in (group.column(number) for number in range(group.num_columns)):
            if leaf.path_in_schema.partition(".")[0] == name:
                statistics = leaf.statistics
                # A list without items counts as one that is null.
                num_nulls = statistics.null_count if statistics is not None and statistics.has_null_count else 0
                num_values = max(num_values, leaf.num_values - num_nulls)
        num_filled += min(num_values, group.num_rows)
    return num_filled


def _arrow_batches(file: pa.NativeFile, path: str, source: _Source) -> Iterator[pa.RecordBatch]:
    beginning = file.read(6)
    file.seek(0)
    is_file = beginning == b"ARROW1"
    open_ipc = pa.ipc.open_file if is_file else pa.ipc.open_stream
    names = open_ipc(file).schema.names
    file.seek(0)
    columns = source.wanted(path, names)
    watched = source.watched(names)
    fields = [names.index(name) for name in dict.fromkeys((*columns, *watched))]
    reader = open_ipc(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader
    yield from _used(cast("Iterable[pa.RecordBatch]", batches), columns, watched, source.watch)


def _used(
    batches: Iterable[pa.RecordBatch], columns: list[str], watched: list[str], watch: Watch
) -> Iterator[pa.RecordBatch]:
    """Yield small batches of the used columns, and count the filled cells of the watched ones."""
    for batch in batches:
        for name in watched:
            column = batch.column(name)
            is_nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            if is_nested:
                num_filled = sum(map(bool, column.value_lengths().to_pylist()))
            else:
                num_filled = len(column) - column.null_count
            watch.add(name, num_filled)
        used = batch.select(columns)
        for start in range(0, used.num_rows, BATCH_ROWS):
            yield used.slice(start, BATCH_ROWS)


def _rows_of_batches(batches: Iterable[pa.RecordBatch], path: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        contents: list[SourceRow] | list[SourceRow | str]
        try:
            contents = batch.to_pylist()
        except _UNCONVERTIBLE:
            contents = [_converted(batch.slice(place, 1)) for place in range(batch.num_rows)]
        for content in contents:
            number += 1
            yield Row(f"{path}, row {number}", number, content)


def _converted(row: pa.RecordBatch) -> SourceRow | str:
    """Convert a batch of one row; its fault if a cell has no value in Python, as a date after the year 9999."""
    cells: SourceRow = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            cells[name] = column[0].as_py()
        except _UNCONVERTIBLE as error:
            return f"column {name} holds a {column.type} that cannot be read: {error}"
    return cells


def _saved(path: str, split: str) -> "Dataset":
    import datasets  # a second of import that files do without

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # any, as below
        raise DataError(f"{path} is no folder written by save_to_disk: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path} has no split {split}; the splits there are {', '.join(map(str, saved))}")
        return saved[split]
    return saved


def _from_hub(path: str, split: str) -> "Dataset":
    import datasets

    name, _, configuration = path.partition(":")
    try:
        return cast("Dataset", datasets.load_dataset(name, configuration or None, split=split))
    # Of any kind: a loading script is a RuntimeError, and a file that cannot be parsed an error of `datasets`.
    except Exception as error:
        # Of a file that cannot be parsed, the error says only that; its cause names what is wrong.
        reason = f"{error}: {error.__cause__}" if error.__cause__ is not None else str(error)
        raise DataError(
            f"{path} is no local file or folder, and loading split {split} from the hub failed ({reason}); "
            "correct the path, or download the data set and give its file or folder"
        ) from None


def _data_set_rows(data_set: "Dataset", path: str, source: _Source) -> Iterator[Row]:
    names = data_set.column_names
    columns, watched = source.wanted(path, names), source.watched(names)
    # The data set lies in memory-mapped files: only the selected columns are read.
    arrow = data_set.select_columns([*columns, *watched]).with_format("arrow")
    batches = (batch for table in arrow.iter(batch_size=BATCH_ROWS) for batch in cast("pa.Table", table).to_batches())
    yield from _rows_of_batches(_used(batches, columns, watched, source.watch), path)
