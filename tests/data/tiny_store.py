"""A program: pseudo-labelled pairs stream through an object store that others have nearly filled; two epochs."""

import json
import re
import sys

import numpy as np
import pyarrow as pa
import ray
from ray._private.internal_api import memory_summary

from rayrl.data.batches import optimizer_batches
from rayrl.data.blocks import BlockTable
from rayrl.stages.fitting import stream_of
from rayrl.training.launch import Rows

STORE_BYTES = 80 << 20
NUM_BLOCKS, ROWS_PER_BLOCK, TEXT_BYTES = 60, 40, 100_000  # 240 MB a pass
BATCH_SIZE = 16


def pairs_of(block: int) -> pa.Table:
    """One block as pseudo_label makes them; the text is large in memory, and small in a compressed part."""
    rows = range(block * ROWS_PER_BLOCK, (block + 1) * ROWS_PER_BLOCK)
    return pa.table({"chosen_id": [f"pair-{n}" for n in rows], "prompt": [f"{n} " * (TEXT_BYTES // 5) for n in rows]})


def main(folder: str) -> None:
    """Print what each epoch saw, and what the store had to spill."""
    ray.init(num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    held = [ray.put(np.ones(8 << 20, dtype=np.uint8)) for _ in range(8)]  # 64 of its 80 MB belong to others
    data = Rows(stream_of(BlockTable(f"{folder}/table", NUM_BLOCKS), 0, pairs_of))
    # As training reads them: many blocks are buffered, which the store could not hold.
    drawn = optimizer_batches(data, epochs=2, batch_size=BATCH_SIZE, seed=0)
    epochs: list[list[tuple[str, bool]]] = [[], []]
    for epoch, batch in drawn:
        epochs[epoch] += [(row["chosen_id"], len(row["prompt"]) > TEXT_BYTES // 5) for row in batch]
    spilled = re.search(r"Spilled (\d+) MiB", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
    intact = all(int(ray.get(ref).sum()) == 8 << 20 for ref in held)
    print(json.dumps({"epochs": epochs, "spilled_mib": int(spilled[1]) if spilled else 0, "others_intact": intact}))


if __name__ == "__main__":
    main(sys.argv[1])
