"""Random selection: uniform, by prompts in turn, and k-means++, which draws what is far from the draws before."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from rayrl.algorithms.heads import Heads, mean_and_spread
from rayrl.algorithms.selection.by_heads import heads_of
from rayrl.algorithms.selection.k_center import MAX_DISTANCES, squared_distances
from rayrl.algorithms.selection.shards import (
    Knowledge,
    Selection,
    ShardGroup,
    VectorShard,
    center_pool,
    left_of,
    mixed_ids,
    refuse_number,
    uniform_of,
)

NO_DISTANCE = 1e-12
"""Squared distances below this share of the squared norms are those of equal points."""


class Offer(NamedTuple):
    """Points whose clocks ring next, earliest first."""

    ids: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    """Now."""
    rates: np.ndarray
    """Of the clocks: the weights when they were set."""
    times: np.ndarray
    rings: np.ndarray
    """The number of this ring, from 1."""


def random_selection(ids: Int64[np.ndarray, " n"], num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw ids uniformly without replacement; the order of `ids` does not matter."""
    left = left_of(ids, knowledge.taken)
    refuse_number(num_selected, len(left))
    rng = np.random.default_rng(knowledge.seed if len(knowledge.taken) == 0 else (knowledge.seed, len(knowledge.taken)))
    return Selection(ids=rng.choice(left, num_selected, replace=False).tolist())


def random_by_prompt(ids: Int64[np.ndarray, " n"], num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw one response of every prompt before a second one of any: random selection, stratified by prompt."""
    left = left_of(ids, knowledge.taken)
    refuse_number(num_selected, len(left))
    stride = knowledge.prompt_stride
    everything = np.concatenate([knowledge.taken, left])
    prompts = everything // stride
    # Taken ones go first within their prompts, so that a prompt that was asked about waits for the others.
    is_left = np.arange(len(everything)) >= len(knowledge.taken)
    order = np.lexsort((uniform_of(everything, knowledge.seed, 1), is_left, prompts))
    begins = np.r_[True, np.diff(prompts[order]) > 0]
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    turns = np.empty(len(order), np.int64)
    turns[order] = np.arange(len(order)) - starts  # 0 for a prompt's first, 1 for its second ...
    drawn = np.lexsort((uniform_of(prompts, knowledge.seed, 2), turns))
    return Selection(ids=everything[drawn[is_left[drawn]]][:num_selected].tolist())


class Reached:
    """One shard's points with their squared distances to the nearest draw: the weights of k-means++."""

    def __init__(self, shard: VectorShard, heads: Heads | None, taken: Int64[np.ndarray, " t"]):
        self.shard = shard
        self.points = shard.vectors
        if heads is not None:
            self.points = shard.vectors * mean_and_spread(shard.head_scores(heads))[1].astype(np.float32)[:, None]
        self.norms = np.einsum("nd,nd->n", self.points, self.points, dtype=np.float64)
        self.nearest = np.full(len(shard.ids), np.inf)
        self.left = ~np.isin(shard.ids, taken)

    def absorb(self, drawn: np.ndarray, points: np.ndarray) -> None:
        """Lower the weights by points that were drawn."""
        import torch

        norms = np.einsum("pd,pd->p", points, points, dtype=np.float64)
        right = torch.from_numpy(-2 * points.T.copy())  # pyright: ignore[reportUnknownMemberType]
        offset = torch.from_numpy(norms.astype(np.float32))  # pyright: ignore[reportUnknownMemberType]
        num_rows = 1 + MAX_DISTANCES // max(1, len(points))
        for start in range(0, len(self.nearest) if len(points) else 0, num_rows):
            rows = slice(start, start + num_rows)
            left = torch.from_numpy(self.points[rows])  # pyright: ignore[reportUnknownMemberType]
            nearest = (left @ right).add_(offset).min(1).values.numpy() + self.norms[rows]
            # What float32 leaves of the distance of a point to itself is none.
            rounding = 2 * self.points.shape[1] * np.finfo(np.float32).eps * (self.norms[rows] + norms.max())
            self.nearest[rows] = np.minimum(self.nearest[rows], np.where(nearest > rounding, nearest, 0))
        self.left &= ~np.isin(self.shard.ids, drawn)

    def renew(self, draw: tuple[int, ...]) -> None:
        """Set every point's clock to the rate of its weight now."""
        self.draw = draw
        self.rates = np.where(np.isinf(self.nearest), 1.0, self.nearest)
        self.rings = np.zeros(len(self.rates), np.int64)
        self.times = np.where(self.rates > 0, 0.0, np.inf)

    def offer(self, num: int, since: float) -> Offer:
        """The first `num` points whose clocks ring after `since`."""
        self.left &= self.nearest > 0  # not where something was drawn
        while len(late := np.flatnonzero(self.left & (self.times <= since))):
            self.rings[late] += 1
            self.times[late] += waits_of(self.shard.ids[late], self.draw, self.rings[late]) / self.rates[late]
        rows = np.flatnonzero(self.left & np.isfinite(self.times))
        if len(rows) > num:
            rows = rows[np.argpartition(self.times[rows], num - 1)[:num]]
        rows = rows[np.lexsort((self.shard.ids[rows], self.times[rows]))]
        weights = np.where(np.isinf(self.nearest[rows]), 1.0, self.nearest[rows])
        return Offer(
            self.shard.ids[rows], self.points[rows], weights, self.rates[rows], self.times[rows], self.rings[rows]
        )


def _begin(shard: VectorShard, heads: Heads | None, taken: np.ndarray) -> None:
    shard.work = Reached(shard, heads, taken)


def _points_of(shard: VectorShard, identifiers: np.ndarray) -> np.ndarray:
    return _reached(shard).points[shard.rows_of(identifiers)]


def _absorb(shard: VectorShard, drawn: np.ndarray, points: np.ndarray) -> None:
    _reached(shard).absorb(drawn, points)


def _renew(shard: VectorShard, draw: tuple[int, ...]) -> None:
    _reached(shard).renew(draw)


def _offer(shard: VectorShard, num: int, since: float) -> Offer:
    return _reached(shard).offer(num, since)


def _reached(shard: VectorShard) -> Reached:
    assert isinstance(shard.work, Reached), "the selection has begun on this shard"
    return shard.work


def k_means_pp(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw each point with a probability in proportion to |x - c|^2, c the nearest point drawn before.

    D^2 sampling, the seeding of k-means (Arthur & Vassilvitskii, 2007).
    """
    return _draw_far(shards, num_selected, knowledge, None)


def badge(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Draw by k-means++ on gradient embeddings: diverse, and large where the heads do not know (arXiv 1906.03671).

    The gradient of a head's squared error by its weights is (prediction - label) x. A label that nobody has yet is
    as far off as the heads are from each other, so the embedding is spread(x) x.
    """
    return _draw_far(shards, num_selected, knowledge, heads_of(knowledge))


def _draw_far(shards: ShardGroup, num_selected: int, knowledge: Knowledge, heads: Heads | None) -> Selection:
    """Draw exactly by D^2, many at a time, whatever the sharding.

    Each point has a clock that rings at the rate of its weight, by times that its id draws. The first to ring is a draw
    in proportion to the weights. Draws lower the weights of others, so that a later ring is a draw with the probability
    of the weight now by the clock's rate (thinning, Lewis & Shedler, 1979), as long as no clock that a shard keeps back
    rings before. Clocks are set to the weights again whenever the draws have doubled, or most rings would be in vain.
    """
    pool = center_pool(shards)
    left = left_of(pool.ids, knowledge.taken)
    refuse_number(num_selected, len(left))
    shards.broadcast(_begin, heads, knowledge.taken)
    known = shards.broadcast(_points_of, knowledge.taken)
    if knowledge.initial_centers is not None and heads is None:
        known.append(np.asarray(knowledge.initial_centers, np.float32) - pool.offset)
    shards.broadcast(_absorb, knowledge.taken, np.concatenate(known))
    picks: list[int] = []
    renewal, since, draw = 0, 0.0, ()
    while len(picks) < num_selected:
        if len(picks) == renewal:
            # Another batch of the same seed has other draws.
            renewal, since, draw = max(1, 2 * renewal), 0.0, (knowledge.seed, len(knowledge.taken) + len(picks))
            shards.broadcast(_renew, draw)
        offers = shards.broadcast(_offer, knowledge.candidate_batch, since)
        num = min(num_selected, renewal) - len(picks)
        drawn, points, since = _thinned(offers, num, knowledge.candidate_batch, draw)
        if not any(len(offer.ids) for offer in offers):  # all that is left lies where something was drawn before
            rest = left_of(left, np.array(picks, np.int64))
            order = np.argsort(uniform_of(rest, *draw))
            return Selection(ids=[*picks, *rest[order].tolist()][:num_selected])
        picks += drawn.tolist()
        if len(drawn):
            shards.broadcast(_absorb, drawn, points)
    return Selection(ids=picks)


def _thinned(
    offers: Sequence[Offer], num: int, num_offered: int, draw: tuple[int, ...]
) -> tuple[Int64[np.ndarray, " p"], np.ndarray, float]:
    """Up to `num` draws (ids, points) that no clock kept back can precede, and the time until which all is decided."""
    ids, points, weights, rates, times, rings = (np.concatenate(column) for column in zip(*offers, strict=True))
    kept_back = min((offer.times[-1] for offer in offers if len(offer.ids) == num_offered), default=np.inf)
    queue = [(float(times[row]), int(ids[row]), row, int(rings[row])) for row in range(len(ids))]
    heapq.heapify(queue)
    drawn: list[int] = []
    until = 0.0
    while queue and len(drawn) < num and queue[0][0] <= kept_back:
        until, identifier, row, ring = heapq.heappop(queue)
        if weights[row] == 0:  # where another was drawn
            continue
        if _number(identifier, draw, 2 * ring) * rates[row] < weights[row]:
            drawn.append(row)
            weights = _lowered(weights, points, row)
        else:
            wait = waits_of(np.array([identifier]), draw, np.array([ring + 1]))[0] / rates[row]
            heapq.heappush(queue, (until + float(wait), identifier, row, ring + 1))
    is_full = len(drawn) == num
    return ids[drawn], points[drawn], until if is_full or not np.isfinite(kept_back) else kept_back


def _lowered(weights: Float64[np.ndarray, " m"], points: np.ndarray, row: int) -> Float64[np.ndarray, " m"]:
    """The weights once a row is drawn; what rounding leaves of the distance between equal points is none."""
    squared = squared_distances(points[row][None], points)[0]
    norms = np.einsum("md,md->m", points, points, dtype=np.float64)
    return np.minimum(weights, np.where(squared > NO_DISTANCE * (norms + norms[row]), squared, 0))


def waits_of(
    ids: Int64[np.ndarray, " n"], draw: tuple[int, ...], rings: Int64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """The waits of clocks of rate 1 for their rings of these numbers: exponential, drawn by ids and numbers."""
    return -np.log(uniform_of(mixed_ids(ids, 2 * rings + 1), *draw))


def _number(identifier: int, draw: tuple[int, ...], number: int) -> float:
    return float(uniform_of(mixed_ids(np.array([identifier]), np.array([number])), *draw)[0])
