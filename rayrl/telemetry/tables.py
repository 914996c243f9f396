"""Parquet tables of a run directory, whichever of them are there."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs


def read_parquet(url: str) -> pa.Table | None:
    """A Parquet file, or all parts of a folder; None if there is nothing yet."""
    fs, path = url_to_fs(url)
    parts = [path] if fs.isfile(path) else sorted(fs.glob(f"{path}/part-*.parquet"))
    tables = []
    for part in parts:
        with fs.open(part, "rb") as file:
            tables.append(pq.read_table(io.BytesIO(file.read())))
    return pa.concat_tables(tables) if tables else None
