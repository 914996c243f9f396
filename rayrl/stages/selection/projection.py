"""A 2-d picture of the pool and the chosen points, for the report."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.data.blocks import BlockTable
from rayrl.fleets.coreset import vectors_of
from rayrl.runs import storage

MAX_POINTS = 3000


def write_projection(url: str, vectors: BlockTable, selected: set[int]) -> None:
    """Project the chosen points and a sample of the others on the first two principal axes: x, y, selected."""
    per_block = max(1, MAX_POINTS // max(1, vectors.num_blocks))
    kept_ids, kept = [], []
    for block in vectors.blocks():
        if block.num_rows == 0:
            continue
        ids, points = vectors_of(block)
        chosen = np.isin(ids, list(selected))
        chosen[np.flatnonzero(~chosen)[:per_block]] = True
        kept_ids.append(ids[chosen])
        kept.append(points[chosen])
    ids, points = np.concatenate(kept_ids), np.concatenate(kept)
    is_selected = np.isin(ids, list(selected))
    order = np.argsort(~is_selected, kind="stable")[:MAX_POINTS]
    centred = points[order] - points[order].mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    x, y = (centred @ axes.T).T
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": x, "y": y, "selected": is_selected[order]}), sink)
    storage.write_bytes(url, sink.getvalue())
