"""The table of strategies: values of `select.strategy`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rayrl.algorithms.selection.by_evaluator import score_entropy
from rayrl.algorithms.selection.by_heads import (
    bald,
    k_center_uncertain,
    margin,
    uncertainty,
    unsure_pairs,
    weighted_coverage,
)
from rayrl.algorithms.selection.greedy import d_optimal, facility_location
from rayrl.algorithms.selection.k_center import k_center
from rayrl.algorithms.selection.pairs import (
    delta_ucb,
    double_thompson,
    pair_bald,
    pair_d_optimal,
    pair_margin_large,
    pair_margin_small,
    random_pairs,
)
from rayrl.algorithms.selection.sampling import badge, k_means_pp, random_by_prompt, random_selection
from rayrl.algorithms.selection.shards import Knowledge, Selection, ShardGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to choose what the oracle is asked about, and what it reads."""

    choose: Callable[..., Selection]
    """Called as `choose(pool, num_selected, knowledge)`. The pool is an array of ids; for a strategy that reads vectors
    it is a `ShardGroup`."""
    reads_vectors: bool
    """Whether the pool has to be embedded."""
    reads_heads: bool = False
    """Whether it needs labels before it can choose: another strategy chooses the first batch."""
    reads_evaluator: bool = False
    """Whether it reads how sure the generative evaluator of the round before is: another strategy chooses the first
    round."""
    routes: bool = False
    """Whether it needs to know from which margin on the heads are sure. It may then pick fewer than it is asked for."""
    asks: Literal["responses", "pairs"] = "responses"
    """"pairs": it chooses two responses to one prompt, to be compared. The ids come two by two, and `num_selected`
    counts the pairs."""
    grows: bool = False
    """Whether a larger selection contains the smaller one of the same seed. Otherwise the budget of a run cannot be
    raised: it would ask about others, beyond what it has paid for."""


def _k_center(pool: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    return k_center(
        pool,
        num_selected,
        candidate_batch=knowledge.candidate_batch,
        initial_centers=knowledge.initial_centers,
        taken=knowledge.taken,
        seed=knowledge.seed,
    )


def _by_vectors(choose: Callable[..., Selection], *, grows: bool = False) -> Strategy:
    return Strategy(choose=choose, reads_vectors=True, grows=grows)


def _by_heads(choose: Callable[..., Selection]) -> Strategy:
    return Strategy(choose=choose, reads_vectors=True, reads_heads=True)


def _of_pairs(choose: Callable[..., Selection], *, reads_heads: bool = True) -> Strategy:
    return Strategy(choose=choose, reads_vectors=True, reads_heads=reads_heads, asks="pairs")


STRATEGIES: dict[str, Strategy] = {
    "k_center": _by_vectors(_k_center, grows=True),
    "random": Strategy(choose=random_selection, reads_vectors=False),
    "random_by_prompt": Strategy(choose=random_by_prompt, reads_vectors=False, grows=True),
    "k_means_pp": _by_vectors(k_means_pp),
    "facility_location": _by_vectors(facility_location),
    "d_optimal": _by_vectors(d_optimal),
    "uncertainty": _by_heads(uncertainty),
    "margin": _by_heads(margin),
    "bald": _by_heads(bald),
    "badge": _by_heads(badge),
    "k_center_uncertain": _by_heads(k_center_uncertain),
    "weighted_coverage": _by_heads(weighted_coverage),
    "entropy": Strategy(choose=score_entropy, reads_vectors=False, reads_evaluator=True),
    "random_pairs": Strategy(choose=random_pairs, reads_vectors=False, asks="pairs"),
    "double_thompson": _of_pairs(double_thompson),
    "delta_ucb": _of_pairs(delta_ucb),
    "pair_margin_small": _of_pairs(pair_margin_small),
    "pair_margin_large": _of_pairs(pair_margin_large),
    "pair_bald": _of_pairs(pair_bald),
    "pair_d_optimal": _of_pairs(pair_d_optimal, reads_heads=False),
}
"""Values of `select.strategy`. Config, plan, preflight, selection and report learn of a strategy from its entry."""

ROUTED = Strategy(choose=unsure_pairs, reads_vectors=True, reads_heads=True, routes=True)
"""The choice of `labels = "routed"`, after the first batch."""
