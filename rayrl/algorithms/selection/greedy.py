"""Exact greedy selection by gains that only fall: D-optimal design, and facility location.

For a submodular objective the gain of a point falls as others are picked, so that an old gain bounds today's (Minoux,
1978: lazy greedy). Each shard keeps bounds, makes only the largest of them exact, and offers those points. The driver
picks among the offered as long as none that a shard keeps back can gain more, and the shards then learn of all those
picks at once. The picks are those of the plain greedy loop, in a fraction of its passes over the pool.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Float64, Int64

from rayrl.algorithms.selection.k_center import MAX_DISTANCES, squared_distances
from rayrl.algorithms.selection.shards import (
    EQUAL_DIGITS,
    Knowledge,
    Selection,
    ShardGroup,
    VectorShard,
    center_pool,
    find_vectors,
    largest_first,
    left_of,
    refuse_number,
    uniform_of,
)

MIN_CLIENTS = 4096
"""Facility location covers all points of a pool up to this size, and of a larger one a sample of at least it."""
CLIENTS_PER_PICK = 2
"""Clients of a large pool, per pick: with fewer than one, late picks would have nothing left to cover."""

MAX_NUMBERS = 1 << 20
"""Coordinates of points that are made at once, of those that are not held: 4 MiB, which a processor keeps near."""
NUM_EVALUATED = 16
"""Offered points whose gains are computed together, once the best one's may have fallen."""

Offer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids (int64), centred vectors (float32) and gains (float64), largest first."""


class Points(Protocol):
    """What is picked from on one shard: its vectors, or what is made of them."""

    ids: Int64[np.ndarray, " n"]
    norms: Float64[np.ndarray, " n"]
    """Squared."""

    @property
    def width(self) -> int:
        """Of the vectors."""
        ...

    def vectors_at(self, rows: np.ndarray | slice) -> Float32[np.ndarray, "m d"]:
        """The vectors of some rows."""
        ...

    def rows_of(self, identifiers: Int64[np.ndarray, " m"]) -> np.ndarray:
        """Rows that are picked with, or excluded by, some ids."""
        ...


class Bounds(ABC):
    """Upper bounds on the gains of one shard's points: the shard's part of a lazy greedy selection."""

    def __init__(self, points: Points, upper: Float64[np.ndarray, " n"], taken: Int64[np.ndarray, " t"]):
        self.points = points
        self.upper = upper
        self.fresh = np.zeros(len(upper), np.bool_)  # where `upper` is the gain itself
        self.exclude(points.rows_of(taken))

    def exclude(self, rows: np.ndarray) -> None:
        """Never offer some rows."""
        self.upper[rows] = -np.inf
        self.fresh[rows] = True

    @abstractmethod
    def gains(self, rows: np.ndarray) -> Float64[np.ndarray, " m"]:
        """The gains of some rows now, in float64."""

    def offer(self, num: int, scale: float) -> Offer:
        """The `num` points that gain most, and how much each does; fewer only if there are no more."""
        num = min(num, int(np.isfinite(self.upper).sum()))
        if num == 0:
            return np.empty(0, np.int64), self.points.vectors_at(slice(0)), np.empty(0)
        margin = scale * 10.0**-EQUAL_DIGITS
        while True:
            # Whoever may tie with the last of the best by today's bounds has to be exact.
            threshold = np.partition(self.upper, -num)[-num] - margin
            rivals = np.flatnonzero(self.upper >= threshold)
            stale = rivals[~self.fresh[rivals]]
            if len(stale) == 0:
                break
            self.upper[stale] = self.gains(stale)
            self.fresh[stale] = True
        best = rivals[largest_first(self.upper[rivals], self.points.ids[rivals], scale)[:num]]
        return self.points.ids[best], self.points.vectors_at(best), self.upper[best]


def _bounds_of(shard: VectorShard) -> Bounds:
    assert isinstance(shard.work, Bounds), "the selection has begun on this shard"
    return shard.work


def _offer(shard: VectorShard, num: int, scale: float) -> Offer:
    return _bounds_of(shard).offer(num, scale)


class Objective(Protocol):
    """The driver's part of a lazy greedy selection."""

    def pick(self, vector: Float32[np.ndarray, " d"]) -> None:
        """Add a point to the picks."""
        ...

    def gains(self, vectors: Float32[np.ndarray, "m d"]) -> Float64[np.ndarray, " m"]:
        """The gain that each point would bring now."""
        ...

    def tell(self, shards: ShardGroup, picked: Int64[np.ndarray, " p"]) -> None:
        """Tell the shards of the points that were picked since the last time."""
        ...


def lazy_greedy(
    shards: ShardGroup,
    objective: Objective,
    num_selected: int,
    *,
    candidate_batch: int,
    scale: float,
    group_of: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Selection:
    """Pick the point that gains most, again and again.

    Args:
        shards: the pool; every shard's `work` is a `Bounds` of the objective.
        objective: knows the picks.
        num_selected: points to pick.
        candidate_batch: points that each shard offers at a time.
        scale: the largest gain there can be: gains that agree to `EQUAL_DIGITS` of it are equal.
        group_of: the groups of some ids; of each group one point is picked. By default every point is one.
    """
    picks: list[int] = []
    while len(picks) < num_selected:
        offers = shards.broadcast(_offer, candidate_batch, scale)
        picked = _pick_certain(offers, objective, num_selected - len(picks), candidate_batch, scale, group_of)
        picks += picked
        objective.tell(shards, np.array(picked, np.int64))
    return Selection(ids=picks)


def _pick_certain(
    offers: Sequence[Offer],
    objective: Objective,
    num: int,
    num_offered: int,
    scale: float,
    group_of: Callable[[np.ndarray], np.ndarray],
) -> list[int]:
    """Up to `num` picks that no point left unoffered can precede; at least one."""
    ids, vectors, gains = (np.concatenate(column) for column in zip(*offers, strict=True))
    # A shard that has offered all it has keeps nothing back. The others keep back what comes after their last offer.
    ends = np.cumsum([len(shard_ids) for shard_ids, _, _ in offers]) - 1
    horizons = [end for end, (shard_ids, _, _) in zip(ends, offers, strict=True) if len(shard_ids) == num_offered]
    unit = scale * 10.0**-EQUAL_DIGITS or 1.0
    kept_back = min(((-np.rint(gains[end] / unit), ids[end]) for end in horizons), default=(np.inf, 0))
    groups = group_of(ids)
    steps = -np.rint(gains / unit)  # the smallest step gains most; infinite once it cannot be picked
    fresh = np.ones(len(ids), np.bool_)
    picked: list[int] = []
    while len(picked) < num and np.isfinite(steps).any():
        tied = np.flatnonzero(steps == steps.min())
        best = int(tied[np.argmin(ids[tied])])
        if picked and (steps[best], ids[best]) > kept_back:
            break
        if not fresh[best]:  # a gain of before the last picks: a bound
            likely = np.argsort(steps, kind="stable")[:NUM_EVALUATED]
            stale = likely[~fresh[likely] & np.isfinite(steps[likely])]
            steps[stale] = np.maximum(steps[stale], -np.rint(objective.gains(vectors[stale]) / unit))
            fresh[stale] = True
            continue
        picked.append(int(ids[best]))
        objective.pick(vectors[best])
        steps[groups == groups[best]] = np.inf
        fresh[:] = False
    return picked


class LeverageBounds(Bounds):
    """Bounds on x' V^-1 x."""

    def __init__(self, points: Points, inverse: Float64[np.ndarray, "d d"], taken: Int64[np.ndarray, " t"]):
        self.inverse = inverse
        super().__init__(points, np.full(len(points.ids), np.inf), taken)
        rows = np.flatnonzero(self.upper > 0)
        self.upper[rows] = self.gains(rows)
        self.fresh[rows] = True

    def gains(self, rows: np.ndarray) -> Float64[np.ndarray, " m"]:
        gains = np.empty(len(rows))
        for part in np.array_split(np.arange(len(rows)), 1 + len(rows) * self.points.width // MAX_DISTANCES):
            vectors = self.points.vectors_at(rows[part]).astype(np.float64)
            gains[part] = np.einsum("md,md->m", vectors @ self.inverse, vectors)
        return gains

    def absorb(self, inverse: np.ndarray, falls: Float64[np.ndarray, "p d"]) -> None:
        """Lower the bounds by |falls x|^2, less what float32 may have rounded."""
        import torch

        self.inverse = inverse
        width = self.points.width
        right = torch.from_numpy(falls.astype(np.float32).T.copy())  # pyright: ignore[reportUnknownMemberType]
        rounding = (width + 8) * np.finfo(np.float32).eps / 2 * float(np.linalg.norm(falls))
        num_rows = 1 + min(MAX_DISTANCES // len(falls), MAX_NUMBERS // width)
        for start in range(0, len(self.upper), num_rows):
            rows = slice(start, start + num_rows)
            left = torch.from_numpy(self.points.vectors_at(rows))  # pyright: ignore[reportUnknownMemberType]
            length = np.sqrt((left @ right).square().sum(1).numpy().astype(np.float64))
            # |fl(B x)| is within `rounding` |x| of |B x|.
            least = np.maximum(length - rounding * np.sqrt(self.points.norms[rows]), 0)
            self.upper[rows] -= least**2
        self.fresh[np.isfinite(self.upper)] = False


def _begin_leverage(shard: VectorShard, inverse: np.ndarray, taken: np.ndarray) -> float:
    bounds = LeverageBounds(shard, inverse, taken)
    shard.work = bounds
    return float(bounds.upper.max(initial=0.0))


def _absorb_leverage(shard: VectorShard, inverse: np.ndarray, falls: np.ndarray, excluded: np.ndarray) -> None:
    bounds = _bounds_of(shard)
    assert isinstance(bounds, LeverageBounds)
    bounds.absorb(inverse, falls)
    bounds.exclude(bounds.points.rows_of(excluded))


class Information:
    """V^-1 of the picks: log det V grows by log(1 + x' V^-1 x) with x."""

    def __init__(
        self, inverse: Float64[np.ndarray, "d d"], others_of: Callable[[np.ndarray], np.ndarray] | None = None
    ):
        self.inverse = inverse
        self.falls: list[np.ndarray] = []
        self.others_of = others_of

    def pick(self, vector: Float32[np.ndarray, " d"]) -> None:
        x = vector.astype(np.float64)
        along = self.inverse @ x
        # Sherman-Morrison: V^-1 falls by fall fall', so that x' V^-1 x falls by (fall.x)^2.
        fall = along / np.sqrt(1 + x @ along)
        self.inverse = self.inverse - np.outer(fall, fall)
        self.falls.append(fall)

    def gains(self, vectors: Float32[np.ndarray, "m d"]) -> Float64[np.ndarray, " m"]:
        x = vectors.astype(np.float64)
        return np.einsum("md,md->m", x @ self.inverse, x)

    def tell(self, shards: ShardGroup, picked: Int64[np.ndarray, " p"]) -> None:
        excluded = picked if self.others_of is None else self.others_of(picked)
        shards.broadcast(_absorb_leverage, self.inverse, np.stack(self.falls), excluded)
        self.falls = []


def information_of(vectors: Float32[np.ndarray, "m d"], ridge: float, width: int) -> Float64[np.ndarray, "d d"]:
    """V^-1 with V = ridge I + sum x x' over vectors that are known already."""
    x = vectors.astype(np.float64).reshape(len(vectors), width)
    return np.linalg.inv(ridge * np.eye(width) + x.T @ x)


def d_optimal(shards: ShardGroup, num_selected: int, knowledge: Knowledge) -> Selection:
    """Pick argmax_i log det(V + x_i x_i'), V = ridge I + sum of what is labelled: greedy D-optimal design.

    For a linear model it is the choice from which the weights are learnt best, and for the heads' posterior greedy
    batch BALD as well (Kirsch et al., arXiv 1906.08158). Feature differences of pairs: `pairs.pair_d_optimal`; Kveton
    et al., arXiv 2503.01076. `ridge` is the heads', or without them the pool's mean squared norm.
    """
    pool = center_pool(shards)
    refuse_number(num_selected, len(left_of(pool.ids, knowledge.taken)))
    width = len(pool.offset)
    ridge = knowledge.heads.ridge if knowledge.heads is not None else pool.mean_norm or 1.0
    known = [np.empty((0, width), np.float32), find_vectors(shards, knowledge.taken)]
    if knowledge.initial_centers is not None:
        known.append(np.asarray(knowledge.initial_centers, np.float32) - pool.offset)
    information = Information(information_of(np.concatenate(known), ridge, width))
    scale = max(shards.broadcast(_begin_leverage, information.inverse, knowledge.taken))
    return lazy_greedy(shards, information, num_selected, candidate_batch=knowledge.candidate_batch, scale=scale)


class CoverBounds(Bounds):
    """Bounds on sum_j w_j max(0, D_j - |x - c_j|^2) over the clients c."""

    def __init__(
        self,
        shard: VectorShard,
        clients: Float32[np.ndarray, "j d"],
        weights: Float64[np.ndarray, " j"],
        distances: Float64[np.ndarray, " j"],
        taken: Int64[np.ndarray, " t"],
    ):
        import torch

        self.clients, self.weights, self.distances = clients, weights, distances
        client_norms = np.einsum("jd,jd->j", clients, clients, dtype=np.float64)
        upper = np.empty(len(shard.ids))
        right = torch.from_numpy(2 * clients.T.copy())  # pyright: ignore[reportUnknownMemberType]
        reach = torch.from_numpy((distances - client_norms).astype(np.float32))  # pyright: ignore[reportUnknownMemberType]
        weigh = torch.from_numpy(weights.astype(np.float32))  # pyright: ignore[reportUnknownMemberType]
        rounding = (clients.shape[1] + 16) * np.finfo(np.float32).eps / 2
        largest_client = float(client_norms.max(initial=0.0))
        num_rows = 1 + MAX_DISTANCES // len(clients)
        for start in range(0, len(upper), num_rows):
            rows = slice(start, start + num_rows)
            left = torch.from_numpy(shard.vectors[rows])  # pyright: ignore[reportUnknownMemberType]
            norms = torch.from_numpy(shard.norms[rows].astype(np.float32))  # pyright: ignore[reportUnknownMemberType]
            near = (left @ right).add_(reach).sub_(norms[:, None]).clamp_(min=0)
            # A rounding for each addend, over all clients.
            slack = 4 * rounding * (shard.norms[rows] + largest_client) * weights.sum()
            upper[rows] = (near @ weigh).numpy() * (1 + len(clients) * 1e-7) + slack
        super().__init__(shard, upper, taken)

    def gains(self, rows: np.ndarray) -> Float64[np.ndarray, " m"]:
        gains = np.empty(len(rows))
        for part in np.array_split(np.arange(len(rows)), 1 + len(rows) * len(self.clients) // MAX_DISTANCES):
            squared = squared_distances(self.points.vectors_at(rows[part]), self.clients)
            gains[part] = np.maximum(self.distances - squared, 0) @ self.weights
        return gains


def _begin_cover(
    shard: VectorShard, clients: np.ndarray, weights: np.ndarray, distances: np.ndarray, taken: np.ndarray
) -> None:
    shard.work = CoverBounds(shard, clients, weights, distances, taken)


def _absorb_cover(shard: VectorShard, distances: np.ndarray, picked: np.ndarray) -> None:
    bounds = _bounds_of(shard)
    assert isinstance(bounds, CoverBounds)
    bounds.distances = distances
    bounds.fresh[np.isfinite(bounds.upper)] = False  # gains fall: what was exact is a bound now
    bounds.exclude(shard.rows_of(picked))


class Cover:
    """Squared distances of all clients to the nearest pick."""

    def __init__(self, clients: np.ndarray, weights: np.ndarray, distances: np.ndarray):
        self.clients, self.weights, self.distances = clients, weights, distances

    def pick(self, vector: Float32[np.ndarray, " d"]) -> None:
        self.distances = np.minimum(self.distances, squared_distances(vector[None], self.clients)[0])

    def gains(self, vectors: Float32[np.ndarray, "m d"]) -> Float64[np.ndarray, " m"]:
        return np.maximum(self.distances - squared_distances(vectors, self.clients), 0) @ self.weights

    def tell(self, shards: ShardGroup, picked: Int64[np.ndarray, " p"]) -> None:
        shards.broadcast(_absorb_cover, self.distances, picked)


def facility_location(
    shards: ShardGroup,
    num_selected: int,
    knowledge: Knowledge,
    *,
    weights_of: Callable[[Int64[np.ndarray, " j"]], Float64[np.ndarray, " j"]] | None = None,
) -> Selection:
    """Pick argmax_i sum_j w_j (D_j - min(D_j, |x_i - x_j|^2)), D_j the squared distance of j to its nearest pick.

    Facility location in the form of exemplar clustering (Mirzasoleiman et al., arXiv 1411.0541): every point starts
    with the pool's mean as its exemplar. The sum is over all points of a pool of up to `MIN_CLIENTS`, and over a
    sample drawn by the ids of a larger one. Unlike k-center it covers the many rather than the far.
    """
    pool = center_pool(shards)
    refuse_number(num_selected, len(left_of(pool.ids, knowledge.taken)))
    num_clients = min(len(pool.ids), max(MIN_CLIENTS, CLIENTS_PER_PICK * (num_selected + len(knowledge.taken))))
    drawn = np.sort(pool.ids[np.argsort(uniform_of(pool.ids, knowledge.seed, 0))[:num_clients]])
    clients = find_vectors(shards, drawn)
    weights = np.ones(len(drawn)) if weights_of is None else weights_of(drawn)
    cover = Cover(clients, weights, np.einsum("jd,jd->j", clients, clients, dtype=np.float64))
    known = [find_vectors(shards, knowledge.taken)]
    if knowledge.initial_centers is not None:
        known.append(np.asarray(knowledge.initial_centers, np.float32) - pool.offset)
    for vector in np.concatenate(known):
        cover.pick(vector)
    shards.broadcast(_begin_cover, clients, weights, cover.distances, knowledge.taken)
    scale = float(weights @ cover.distances)
    return lazy_greedy(shards, cover, num_selected, candidate_batch=knowledge.candidate_batch, scale=scale)
