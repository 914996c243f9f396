"""Selection by what the heads do not know: spread, margin, expected information; and coverage weighted by spread."""

import numpy as np
from jaxtyping import Float, Float64, Int64

from rayrl.algorithms.heads import Heads, mean_and_spread
from rayrl.algorithms.routing import margins_of
from rayrl.algorithms.scoring import entropy
from rayrl.algorithms.selection.greedy import facility_location
from rayrl.algorithms.selection.k_center import k_center
from rayrl.algorithms.selection.shards import (
    Knowledge,
    Selection,
    ShardGroup,
    VectorShard,
    center_pool,
    largest,
    left_of,
    refuse_number,
    top,
)

OVERSAMPLING = 5
"""k_center_uncertain: candidates of the coverage, per pick."""
NUM_GRADES = 64
"""Grades between which BALD tells labels apart."""
GRADE_MARGIN = 3.0
"""The grades reach this many standard deviations of the noise beyond the heads' scores."""


def heads_of(knowledge: Knowledge) -> Heads:
    """The heads, which a strategy that reads them is always given."""
    assert knowledge.heads is not None, "the first batch has another strategy"
    return knowledge.heads


def uncertainty(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick argmax_i std_m score_m(x_i): where the heads disagree most (query by committee, Seung et al., 1992)."""
    pool = center_pool(shards)
    refuse_number(num_selected, len(left_of(pool.ids, knowledge.taken)))
    return Selection(ids=largest(shards, num_selected, _spreads, heads_of(knowledge), knowledge.taken).tolist())


def _spreads(shard: VectorShard, num: int, heads: Heads, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left = ~np.isin(shard.ids, taken)
    return top(mean_and_spread(shard.head_scores(heads))[1][left], shard.ids[left], num)


def bald(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick argmax_i I(label_i; head): the label from which most is learnt about the heads (arXiv 1112.5745).

    H(mean_m p_m) - mean_m H(p_m), p_m the distribution of the label by head m: normal about its score, with the heads'
    noise, in grades. As long as the spread is large beside the noise, it tells apart what the spread alone does not:
    heads in two camps, and heads that are evenly spread.
    """
    pool = center_pool(shards)
    refuse_number(num_selected, len(left_of(pool.ids, knowledge.taken)))
    return Selection(ids=largest(shards, num_selected, _informations, heads_of(knowledge), knowledge.taken).tolist())


def _informations(shard: VectorShard, num: int, heads: Heads, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left = ~np.isin(shard.ids, taken)
    scores = shard.head_scores(heads)[left]
    parts = np.array_split(scores, 1 + len(scores) // 4096)
    return top(np.concatenate([label_information(part, heads.noise) for part in parts]), shard.ids[left], num)


def label_information(scores: Float[np.ndarray, "n m"], noise: float) -> Float64[np.ndarray, " n"]:
    """The mutual information, in nats, between a label and the head that is right; at most log m."""
    noise = max(noise, float(np.finfo(np.float32).tiny))
    low, high = scores.min(1) - GRADE_MARGIN * noise, scores.max(1) + GRADE_MARGIN * noise
    steps = np.arange(NUM_GRADES) / (NUM_GRADES - 1)
    grades = low[:, None] + (high - low)[:, None] * steps  # (n, grades)
    logits = -(((grades[:, None] - scores[:, :, None]) / noise) ** 2) / 2  # (n, m, grades)
    p = np.exp(logits - logits.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    return entropy(p.mean(1)) - entropy(p).mean(1)


def margin(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Ask about both of a prompt's two best responses, where the heads' mean tells them apart least.

    DPO learns which response is the best one, so that is where a label changes a pair (margin sampling, Scheffer et
    al., 2001). A prompt with a single response left to ask about comes after all others.
    """
    pool = center_pool(shards)
    refuse_number(num_selected, len(left_of(pool.ids, knowledge.taken)))
    arguments = heads_of(knowledge), knowledge.taken, knowledge.prompt_stride
    pairs = largest(shards, num_selected, _narrow_pairs, *arguments)
    picks = list(dict.fromkeys(pairs.ravel().tolist()))
    if len(picks) < num_selected:  # every prompt's best two are asked about: what is left, by the heads' disagreement
        taken = np.concatenate([knowledge.taken, np.array(picks, np.int64)])
        picks += largest(shards, num_selected - len(picks), _spreads, heads_of(knowledge), taken).tolist()
    return Selection(ids=picks[:num_selected])


def _narrow_pairs(
    shard: VectorShard, num: int, heads: Heads, taken: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt's best two responses that are left, the better first, and minus their difference."""
    scores = mean_and_spread(shard.head_scores(heads))[0]
    left = ~np.isin(shard.ids, taken)
    ids, scores = shard.ids[left], scores[left]
    order = np.lexsort((ids, -scores, ids // stride))
    ids, scores = ids[order], scores[order]
    prompts = ids // stride
    begins = np.r_[True, prompts[1:] != prompts[:-1]] if len(ids) else np.empty(0, np.bool_)
    first = np.flatnonzero(begins[:-1] & ~begins[1:])  # prompts with two or more
    pairs = np.stack([ids[first], ids[first + 1]], axis=1)
    return top(scores[first + 1] - scores[first], pairs, num)


def unsure_pairs(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Ask about each prompt's best and worst response whose order is not sure, the least sure first.

    They are what DPO learns from. As many as there are: fewer than `num_selected` once the heads are sure of the rest.
    """
    center_pool(shards)
    arguments = heads_of(knowledge), knowledge.taken, knowledge.prompt_stride, knowledge.sure_margin
    pairs = largest(shards, num_selected, _unsure, *arguments)
    picks = pairs.ravel()
    return Selection(ids=picks[~np.isin(picks, knowledge.taken)].tolist()[:num_selected])


def _unsure(
    shard: VectorShard, num: int, heads: Heads, taken: np.ndarray, stride: int, sure: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt's best and worst response that are not sure and not both asked about, and minus their margins."""
    scores = shard.head_scores(heads)
    order = np.lexsort((shard.ids, -scores.mean(1), shard.ids // stride))
    prompts = shard.ids[order] // stride
    changes = np.flatnonzero(np.diff(prompts)) + 1
    best, worst = order[np.r_[0, changes]], order[np.r_[changes, len(order)] - 1]
    margins, _ = margins_of(scores[best] - scores[worst])
    is_asked = np.isin(shard.ids[best], taken) & np.isin(shard.ids[worst], taken)
    unsure = (best != worst) & ~is_asked & (margins < sure)
    return top(-margins[unsure], np.stack([shard.ids[best], shard.ids[worst]], axis=1)[unsure], num)


def k_center_uncertain(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Cover by k-center the most uncertain points, five for each pick: neither outliers only nor copies only."""
    pool = center_pool(shards)
    left = left_of(pool.ids, knowledge.taken)
    refuse_number(num_selected, len(left))
    num_allowed = min(OVERSAMPLING * num_selected, len(left))
    return k_center(
        shards,
        num_selected,
        candidate_batch=knowledge.candidate_batch,
        initial_centers=knowledge.initial_centers,
        taken=knowledge.taken,
        allowed=largest(shards, num_allowed, _spreads, heads_of(knowledge), knowledge.taken),
        seed=knowledge.seed,
    )


def weighted_coverage(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick by facility location, each point to be covered as much as the heads disagree about it."""
    center_pool(shards)  # whoever reads the heads' scores needs the vectors' offset

    def weights_of(ids: Int64[np.ndarray, " j"]) -> Float64[np.ndarray, " j"]:
        found = shards.broadcast(_spreads_of, heads_of(knowledge), ids)
        spreads = np.concatenate([values for _, values in found])
        order = np.argsort(np.concatenate([owned for owned, _ in found]))
        return spreads[order]  # `ids` are sorted

    return facility_location(shards, num_selected, knowledge, weights_of=weights_of)


def _spreads_of(shard: VectorShard, heads: Heads, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = shard.rows_of(ids)
    return shard.ids[rows], mean_and_spread(shard.head_scores(heads)[rows])[1]
