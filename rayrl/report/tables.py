"""Parquet tables of a run directory, from as many of their parts as are written."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.runs import storage


def read_parquet(url: str) -> pa.Table | None:
    """Read a Parquet file, or all parts of a folder; None if nothing is written yet."""
    if url.endswith(".parquet"):
        urls = [url] if storage.exists(url) else []
    else:
        parts = [name for name in storage.children(url) if name.startswith("part-") and name.endswith(".parquet")]
        urls = [storage.join(url, part) for part in parts]
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(part))) for part in urls]
    return pa.concat_tables(tables) if tables else None
