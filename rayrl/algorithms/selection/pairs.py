"""Selection of comparisons: which two responses to one prompt the oracle is asked about.

Each strategy takes one pair of a prompt, so that a budget is spread over prompts. The ids of a selection come two by
two, the first of a pair before its second.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rayrl.algorithms.heads import Heads
from rayrl.algorithms.scoring import entropy
from rayrl.algorithms.selection.by_heads import heads_of
from rayrl.algorithms.selection.greedy import MAX_NUMBERS, Information, LeverageBounds, information_of, lazy_greedy
from rayrl.algorithms.selection.shards import (
    Knowledge,
    Selection,
    ShardGroup,
    VectorShard,
    center_pool,
    find_vectors,
    largest,
    refuse_number,
    top,
    uniform_of,
)

OPTIMISM = 1.0
"""delta_ucb: standard deviations by which the gap between two responses is taken to be larger."""
MAX_SCORES = 1 << 24
"""Differences of scores that are in memory at once."""

Values = Callable[..., Float64[np.ndarray, " p"]]
"""Value of pairs, as `values(score differences of all heads (p, m))`."""


def pairs_within(
    ids: Int64[np.ndarray, " n"], stride: int, taken: Int64[np.ndarray, " t"]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (first, second) of all pairs of responses to one prompt, but for the prompts of `taken`."""
    order = np.argsort(ids)
    order = order[~np.isin(ids[order] // stride, np.unique(taken // stride))]
    prompts = ids[order] // stride
    firsts: list[np.ndarray] = []
    seconds: list[np.ndarray] = []
    for distance in range(1, len(order)):
        first = np.flatnonzero(prompts[distance:] == prompts[:-distance])
        if len(first) == 0:
            break
        firsts.append(order[first])
        seconds.append(order[first + distance])
    none = np.empty(0, np.int64)
    return np.concatenate([none, *firsts]), np.concatenate([none, *seconds])


def num_pairs_possible(shard: VectorShard, stride: int, taken: np.ndarray) -> int:
    """Count the prompts of a shard of which a pair may be picked."""
    return len(np.unique(shard.ids[pairs_within(shard.ids, stride, taken)[0]] // stride))


def _refuse_number(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> None:
    num = sum(shards.broadcast(num_pairs_possible, knowledge.prompt_stride, knowledge.taken))
    refuse_number(num_selected, num)


def _best_pairs(
    shard: VectorShard, num: int, heads: Heads, taken: np.ndarray, stride: int, values: Values
) -> tuple[np.ndarray, np.ndarray]:
    """The pair of each prompt with the largest value, and these; the one that scores more goes first."""
    first, second = pairs_within(shard.ids, stride, taken)
    scores = shard.head_scores(heads)
    value, is_worse = np.empty(len(first)), np.empty(len(first), np.bool_)
    for part in np.array_split(np.arange(len(first)), 1 + len(first) * scores.shape[1] // MAX_SCORES):
        differences = scores[first[part]] - scores[second[part]]
        value[part], is_worse[part] = values(differences), differences.mean(1) < 0
    pairs = np.stack([shard.ids[np.where(is_worse, second, first)], shard.ids[np.where(is_worse, first, second)]], 1)
    prompts = pairs[:, 0] // stride
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -value, prompts))
    best = order[np.r_[True, np.diff(prompts[order]) > 0]] if len(order) else order
    return top(value[best], pairs[best], num)


def _by_value(shards: ShardGroup, num_selected: int, knowledge: Knowledge, values: Values) -> Selection:
    center_pool(shards)
    _refuse_number(shards, num_selected, knowledge)
    arguments = heads_of(knowledge), knowledge.taken, knowledge.prompt_stride, values
    return Selection(ids=largest(shards, num_selected, _best_pairs, *arguments).ravel().tolist())


def delta_ucb(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick the pairs with the largest optimistic gap, |mean_m d_m| + std_m d_m (DeltaUCB, arXiv 2603.09692).

    A clear preference teaches a policy more than a near tie, and is labelled right more often.
    """
    return _by_value(shards, num_selected, knowledge, optimistic_gaps)


def optimistic_gaps(differences: Float64[np.ndarray, "p m"]) -> Float64[np.ndarray, " p"]:
    """|mean| + std over the heads."""
    return np.abs(differences.mean(1)) + OPTIMISM * differences.std(1, ddof=1)


def pair_margin_large(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick the pairs that the heads' mean tells apart most: the margin of APL (arXiv 2402.08114), by heads."""
    return _by_value(shards, num_selected, knowledge, margins)


def pair_margin_small(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick the pairs that the heads' mean tells apart least: where ADPO asks (arXiv 2402.09401), by heads."""
    return _by_value(shards, num_selected, knowledge, narrowness)


def margins(differences: Float64[np.ndarray, "p m"]) -> Float64[np.ndarray, " p"]:
    """|mean| over the heads."""
    return np.abs(differences.mean(1))


def narrowness(differences: Float64[np.ndarray, "p m"]) -> Float64[np.ndarray, " p"]:
    """-|mean| over the heads."""
    return -margins(differences)


def pair_bald(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick the pairs whose preference tells most about the heads, I(preference; head) (arXiv 1112.5745)."""
    return _by_value(shards, num_selected, knowledge, preference_information)


def preference_information(differences: Float64[np.ndarray, "p m"]) -> Float64[np.ndarray, " p"]:
    """H(mean_m p_m) - mean_m H(p_m) in nats, p_m = sigma(d_m)."""
    wins = 1 / (1 + np.exp(-np.clip(differences, -60, 60)))
    both = np.stack([wins, 1 - wins], axis=-1)  # (p, m, 2)
    return entropy(both.mean(1)) - entropy(both).mean(1)


def random_pairs(ids: Int64[np.ndarray, " n"], num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw prompts, and two responses of each, uniformly."""
    stride, seed = knowledge.prompt_stride, knowledge.seed
    left = np.sort(ids[~np.isin(ids // stride, knowledge.taken // stride)])
    order = np.lexsort((uniform_of(left, seed, 1), left // stride))
    drawn = left[order]
    prompts = drawn // stride
    begins = np.r_[True, prompts[1:] != prompts[:-1]] if len(drawn) else np.empty(0, np.bool_)
    first = np.flatnonzero(begins[:-1] & ~begins[1:])  # prompts with two or more
    refuse_number(num_selected, len(first))
    first = first[np.argsort(uniform_of(prompts[first], seed, 2))][:num_selected]
    return Selection(ids=np.stack([drawn[first], drawn[first + 1]], 1).ravel().tolist())


def double_thompson(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw prompts, and of each the best responses by two heads that are drawn (double Thompson sampling).

    As Dwaracherla et al., arXiv 2402.00396. Where the two heads agree on the best response, the second is the second
    head's next best.
    """
    center_pool(shards)
    _refuse_number(shards, num_selected, knowledge)
    arguments = heads_of(knowledge), knowledge.taken, knowledge.prompt_stride, knowledge.seed
    return Selection(ids=largest(shards, num_selected, _two_bests, *arguments).ravel().tolist())


def _two_bests(
    shard: VectorShard, num: int, heads: Heads, taken: np.ndarray, stride: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    scores = shard.head_scores(heads)
    rows = np.unique(np.concatenate(pairs_within(shard.ids, stride, taken)))
    ids, scores = shard.ids[rows], scores[rows]
    prompts = ids // stride
    num_heads = scores.shape[1]
    drawn = [(uniform_of(prompts, seed, draw) * num_heads).astype(np.int64) for draw in (1, 2)]
    by_first, by_second = (scores[np.arange(len(ids)), heads_drawn] for heads_drawn in drawn)
    first = _first_of_each(prompts, by_first, ids)
    # Without the first head's best, the best by the second head.
    others = np.setdiff1d(np.arange(len(ids)), first)
    second = others[_first_of_each(prompts[others], by_second[others], ids[others])]
    pairs = np.stack([ids[first], ids[second]], axis=1)
    return top(uniform_of(prompts[first], seed, 3), pairs, num)


def _first_of_each(prompts: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The row of each prompt's largest score, by rising prompt."""
    order = np.lexsort((ids, -scores, prompts))
    return order[np.r_[True, np.diff(prompts[order]) > 0]] if len(order) else order


def pair_d_optimal(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick argmax log det(V + d d') over differences d of two responses' vectors (ADPO+, arXiv 2503.01076).

    For Bradley-Terry on linear features it is the choice from which the preferences are learnt best. `taken` holds the
    pairs that were asked about, two by two.
    """
    pool = center_pool(shards)
    _refuse_number(shards, num_selected, knowledge)
    stride, width = knowledge.prompt_stride, len(pool.offset)
    asked = find_vectors(shards, knowledge.taken)
    # A preference between two near equals has 1/4 of the information of a measurement.
    ridge = 4 * (knowledge.heads.ridge if knowledge.heads is not None else 2 * pool.mean_norm or 1.0)
    information = Information(
        information_of(asked[::2] - asked[1::2], ridge, width), lambda picked: picked // (stride * stride)
    )
    scale = max(shards.broadcast(_begin_differences, information.inverse, knowledge.taken, stride))
    selection = lazy_greedy(
        shards,
        information,
        num_selected,
        candidate_batch=knowledge.candidate_batch,
        scale=scale,
        group_of=lambda ids: ids // (stride * stride),
    )
    ids = [(number // stride, number // (stride * stride) * stride + number % stride) for number in selection.ids]
    return Selection(ids=[identifier for pair in ids for identifier in pair])


class Differences:
    """Differences of two responses' vectors; `first * stride + (second - first's prompt)` is the id of a pair.

    They are made as they are read: of k responses a prompt they would be (k - 1) / 2 times as large as the pool.
    """

    def __init__(self, shard: VectorShard, stride: int, taken: np.ndarray):
        self.shard, self.stride = shard, stride
        self.first, self.second = pairs_within(shard.ids, stride, taken)
        self.ids = shard.ids[self.first] * stride + shard.ids[self.second] % stride
        self.norms = np.empty(len(self.ids))
        for part in np.array_split(np.arange(len(self.ids)), 1 + len(self.ids) * self.width // MAX_NUMBERS):
            vectors = self.vectors_at(part)
            self.norms[part] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.shard.width

    def vectors_at(self, rows: np.ndarray | slice) -> Float32[np.ndarray, "m d"]:
        """Make the differences of some pairs."""
        return self.shard.vectors[self.first[rows]] - self.shard.vectors[self.second[rows]]

    def rows_of(self, identifiers: np.ndarray) -> np.ndarray:
        """Rows of all pairs of some prompts: of each prompt one pair is picked."""
        return np.flatnonzero(np.isin(self.ids // (self.stride * self.stride), identifiers))


def _begin_differences(shard: VectorShard, inverse: np.ndarray, taken: np.ndarray, stride: int) -> float:
    bounds = LeverageBounds(Differences(shard, stride, taken), inverse, np.empty(0, np.int64))
    shard.work = bounds
    return float(bounds.upper.max(initial=0.0))
