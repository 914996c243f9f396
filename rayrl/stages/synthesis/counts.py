"""What a run of synthetic preference generation amounts to, counted block by block: the driver sees only the counts."""

import math
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

GAMMAS = [tenth / 10 for tenth in range(11)]
REASONS = ("accepted", "one_cluster", "low_confidence", "abstained", "tied")


def tally(block: pa.Table) -> dict[str, dict[str, int]]:
    """What the driver learns of a block of outcomes: how many of each kind, in JSON's terms."""
    rows = block.to_pylist()
    clustered = [row for row in rows if row["confidence"] is not None]
    possible = [row["confidence"] for row in clustered if row["chosen"] is not None]
    return {
        "outcomes": Counter(row["reason"] for row in rows),
        "confidences": Counter(f"{tenths(row['confidence']) / 10:.1f}" for row in clustered),
        "cluster_sizes": Counter(str(size) for row in clustered for size in row["cluster_sizes"]),
        "num_clusters": Counter(str(len(row["cluster_sizes"])) for row in clustered),
        "pairs_by_gamma": {f"{gamma:.1f}": sum(c >= gamma for c in possible) for gamma in GAMMAS},
    }


def tenths(confidence: float) -> int:
    """The bin of a confidence: bin i is ((i - 1) / 10, i / 10]."""
    return math.ceil(confidence * 10 - 1e-9)


def merge(tallies: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The tallies of all blocks as one, kinds in order."""
    total: dict[str, Counter[str]] = {}
    for one in tallies:
        for name, counts in one.items():
            total.setdefault(name, Counter()).update(counts)
    reasons = total.pop("outcomes", Counter())
    numbered = {name: dict(sorted(counts.items(), key=lambda kind: float(kind[0]))) for name, counts in total.items()}
    return {"outcomes": {reason: reasons[reason] for reason in REASONS if reasons[reason]}} | numbered


def count_lengths(block: pa.Table) -> dict[str, int]:
    """What the driver learns of a block of pairs."""
    sides = ("chosen", "rejected")
    chars = {f"{side}_chars": sum(map(len, block[side].to_pylist())) for side in sides}
    tokens = {f"{side}_tokens": sum(map(len, block[f"{side}_token_ids"].to_pylist())) for side in sides}
    return {"num_pairs": block.num_rows} | chars | tokens


def mean_lengths(counts: Sequence[dict[str, int]]) -> dict[str, float]:
    """Mean lengths of both sides of a pair and how much longer the chosen one is; nothing where there is no pair."""
    num_pairs = sum(count["num_pairs"] for count in counts)
    if not num_pairs:
        return {}
    names = [name for name in counts[0] if name != "num_pairs"]
    means = {f"mean_{name}": sum(count[name] for count in counts) / num_pairs for name in names}
    gaps = {
        f"gap_{unit}": means[f"mean_chosen_{unit}"] - means[f"mean_rejected_{unit}"] for unit in ("chars", "tokens")
    }
    return means | gaps
