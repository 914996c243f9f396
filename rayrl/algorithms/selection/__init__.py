"""Selection of what the oracle is asked about: pure functions over shards of the pool's vectors.

`strategies.STRATEGIES` is the table. A strategy is one function and one entry there.
"""

from rayrl.algorithms.selection.by_evaluator import score_entropy
from rayrl.algorithms.selection.by_heads import bald, uncertainty
from rayrl.algorithms.selection.greedy import d_optimal, facility_location
from rayrl.algorithms.selection.k_center import CoresetShard, k_center
from rayrl.algorithms.selection.pairs import delta_ucb
from rayrl.algorithms.selection.sampling import badge, k_means_pp, random_selection
from rayrl.algorithms.selection.shards import Knowledge, LocalShards, Selection, ShardGroup
from rayrl.algorithms.selection.strategies import ROUTED, STRATEGIES, Strategy

__all__ = [
    "ROUTED",
    "STRATEGIES",
    "CoresetShard",
    "Knowledge",
    "LocalShards",
    "Selection",
    "ShardGroup",
    "Strategy",
    "badge",
    "bald",
    "d_optimal",
    "delta_ucb",
    "facility_location",
    "k_center",
    "k_means_pp",
    "random_selection",
    "score_entropy",
    "uncertainty",
]
