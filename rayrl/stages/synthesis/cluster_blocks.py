"""The clusters of every block of samples, each kept once it is found."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from rayrl.algorithms.clustering import distinct
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, to_table
from rayrl.runs.run import Run
from rayrl.stages.synthesis.clusterers import Clusterer, make_clusterer


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustered:
    """One prompt's clusters: one row of a clusters table."""

    prompt_id: str
    clusters: list[int]
    """The cluster of each response."""
    num_pairs: int
    """Ordered pairs of its samples, repeats included."""
    num_distinct_pairs: int
    """Ordered pairs of different texts among them."""
    num_calls: int
    """Pairs the entailment model has read; the others were decided without."""
    num_truncated: int
    """Pairs it has read without their ends."""


def cluster(
    run: Run, services: Services, m1: Checkpoint, samples: BlockTable, table: BlockTable, clustering: str
) -> dict[str, Any]:
    """Fill the clusters table; what that cost, if an entailment model was asked."""
    clusterer, fleet = make_clusterer(run, services, m1, clustering)
    counts = map_blocks(
        table,
        partial(cluster_block, clusterer, samples),
        concurrency=fleet.concurrency,
        describe=count_clustered,
        progress="cluster",
    )
    if clustering != "embedding":
        services.retire(fleet)
        return nli_costs(counts)
    if run.config.pipeline == "rlp" and not run.config.clusters_by_rewarders:
        services.retire(fleet)
    return {}


def cluster_block(clusterer: Clusterer, samples: BlockTable, block: int) -> pa.Table:
    """One block's clusters. Texts that differ in the space around them only are compared as one."""
    rows = samples.read(block).to_pylist()
    same = [distinct([response["text"].strip() for response in row["responses"]]) for row in rows]
    found = clusterer.find([row["prompt"] for row in rows], [texts for texts, _ in same])
    clustered = []
    for row, (texts, index), of_prompt in zip(rows, same, found, strict=True):
        num_samples = sum(response["num_samples"] for response in row["responses"])
        clustered.append(
            Clustered(
                prompt_id=row["prompt_id"],
                clusters=of_prompt.ids[index].tolist(),
                num_pairs=num_samples * (num_samples - 1),
                num_distinct_pairs=len(texts) * (len(texts) - 1),
                num_calls=of_prompt.num_calls,
                num_truncated=of_prompt.num_truncated,
            )
        )
    return to_table(clustered, Clustered)


def count_clustered(block: pa.Table) -> dict[str, int]:
    """What the driver learns of a block of clusters."""
    names = [name for name in block.column_names if name.startswith("num_")]
    return {name: sum(block[name].to_pylist()) for name in names}


def nli_costs(counts: Sequence[dict[str, int]]) -> dict[str, float]:
    """What the clusters of entailment cost."""
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    return {
        "num_nli_calls": total["num_calls"],
        "num_truncated_pairs": total["num_truncated"],
        "num_sample_pairs": total["num_pairs"],
        "deduplicated_share": 1 - total["num_distinct_pairs"] / max(1, total["num_pairs"]),
    }
