"""A picture of the embedded pool and the chosen points in two dimensions, for the report."""

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
    others_per_block = max(1, MAX_POINTS // max(1, vectors.num_blocks))
    kept_ids: list[np.ndarray] = []
    kept_points: list[np.ndarray] = []
    for block in vectors.blocks():
        if block.num_rows == 0:
            continue
        ids, points = vectors_of(block)
        is_kept = np.isin(ids, list(selected))
        # The first few of the others stand for the rest of their block.
        is_kept[np.flatnonzero(~is_kept)[:others_per_block]] = True
        kept_ids.append(ids[is_kept])
        kept_points.append(points[is_kept])
    ids, points = np.concatenate(kept_ids), np.concatenate(kept_points)
    is_selected = np.isin(ids, list(selected))
    # Chosen points first, so that the limit drops others and not them.
    order = np.argsort(~is_selected, kind="stable")[:MAX_POINTS]
    centred = points[order] - points[order].mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    x, y = (centred @ axes.T).T
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": x, "y": y, "selected": is_selected[order]}), sink)
    storage.write_bytes(url, sink.getvalue())
