"""Parquet tables of a run directory, whichever of them are there."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.runs import storage


def read_parquet(url: str) -> pa.Table | None:
    """A Parquet file, or all parts of a folder; None if there is nothing yet."""
    fs, path = storage.locate(url)
    parts = [path] if fs.isfile(path) else sorted(fs.glob(f"{path}/part-*.parquet"))
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(fs.unstrip_protocol(part)))) for part in parts]
    return pa.concat_tables(tables) if tables else None
