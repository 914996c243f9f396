"""Parquet tables of a run directory, whichever of them are there."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.runs import storage


def read_parquet(url: str) -> pa.Table | None:
    """A Parquet file, or all parts of a folder; None if there is nothing yet."""
    names = [name for name in storage.children(url) if name.startswith("part-") and name.endswith(".parquet")]
    urls = [url] if url.endswith(".parquet") and storage.exists(url) else [storage.join(url, name) for name in names]
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(each))) for each in urls]
    return pa.concat_tables(tables) if tables else None
