"""Which responses to ask the expert about: exact greedy k-center over shards, and random selection.

Greedy farthest-first (Sener & Savarese, arXiv 1708.00489) repeats u = argmax_i min_{j in S} d(x_i, x_j) and is within
twice the optimal covering radius. The plain loop reads the whole matrix once per pick. Here each shard offers its
farthest points, the driver picks among the offered as long as no other point can be farther, and each shard then
absorbs all those picks in one matrix product: the same picks, in a fraction of the passes, and only offered vectors
travel.

Why the picks are exact, whatever the sharding: float32 products only *bound* distances. Every offered distance is
evaluated again in float64, so is every distance that might rival it, and float64 decides. Points whose squared
distances agree to `TIE` of the data's scale are equally far, and the smallest id goes first. The vectors are centred
before anything else: distances stay, but the float32 bounds get tight where a large common mean, usual in language
model embeddings, would drown them.

This is not an approximate coreset method, and it knows nothing about models, text or Ray: `rayrl.fleets.coreset` wraps
`CoresetShard` into actors and implements `ShardGroup` for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

from rayrl.errors import ConfigError, DataError

TIE = 1e-12
"""Squared distances closer than this share of the largest squared norm are equal: float64 rounding, with room."""
_PAIRS = 1 << 23
"""Distances held at once."""

T = TypeVar("T")
Offer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids (int64), centred vectors (float32) and squared distances to the nearest centre (float64), farthest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Picks of greedy k-center."""

    ids: list[int]
    """Distinct ids, in the order they were picked."""
    radii: list[float]
    """`radii[i]`: distance of the worst-covered point once `ids[: i + 1]` (and the initial centres) are centres."""


class ShardGroup(Protocol):
    """All shards of a pool, wherever they live."""

    def broadcast(self, method: Callable[..., T], *arguments: Any) -> list[T]:
        """Call a method of `CoresetShard` on every shard; the answers, in the shards' order."""
        ...


class CoresetShard:
    """Owns some of the pool's vectors, and knows how far each is from its nearest centre."""

    def __init__(self, ids: Int64[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"]):
        assert torch.get_float32_matmul_precision() == "highest", "the error bounds are those of full float32"
        self.ids = np.array(ids, np.int64)
        self.vectors = np.array(vectors, np.float32)  # an own copy: `center` works in place
        if self.vectors.ndim != 2 or len(self.ids) != len(self.vectors):
            raise ValueError(f"vectors must be ({len(self.ids)}, d), one row per id, got {self.vectors.shape}")

    def summary(self) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "2 d"]]:
        """The shard's ids, and per coordinate the sum and the sum of squares of its vectors."""
        squares = np.einsum("nd,nd->d", self.vectors, self.vectors, dtype=np.float64)
        return self.ids, np.stack([self.vectors.sum(0, dtype=np.float64), squares])

    def center(self, mean: Float64[np.ndarray, " d"]) -> float:
        """Subtract the pool's (rounded) mean, forget all centres, and return the largest squared norm."""
        self.vectors -= mean.astype(np.float32)
        self.norms = np.einsum("nd,nd->n", self.vectors, self.vectors, dtype=np.float64)
        self.centers = np.empty((0, self.vectors.shape[1]))
        self.upper = np.full(len(self.ids), np.inf)  # squared distance to the nearest centre is at most this ...
        self.exact = np.zeros(len(self.ids), bool)  # ... and equal to it here
        self.center_norm = 0.0
        return float(self.norms.max(initial=0.0))

    def find(self, identifier: int) -> Float32[np.ndarray, "m d"]:
        """The centred vector of one id: one row, or none if another shard owns it."""
        return self.vectors[self.ids == identifier]

    def absorb(self, centers: Float32[np.ndarray, "m d"], picked: Int64[np.ndarray, " p"]) -> None:
        """Make centred vectors centres, and never offer `picked` again."""
        self.centers = np.concatenate([self.centers, centers.astype(np.float64)])
        norms = np.einsum("md,md->m", centers, centers, dtype=np.float64)
        self.center_norm = max(self.center_norm, float(norms.max()))
        slack, step = self._slack(), 1 + _PAIRS // len(centers)
        for start in range(0, len(self.ids), step):
            rows = slice(start, start + step)
            products = (torch.from_numpy(-2 * centers) @ torch.from_numpy(self.vectors[rows]).T).numpy()
            products += norms.astype(np.float32)[:, None]
            nearest = products.min(0) + self.norms[rows]
            self.exact[rows] &= np.maximum(nearest - slack[rows], 0) >= self.upper[rows]
            np.minimum(self.upper[rows], nearest + slack[rows], out=self.upper[rows])
        gone = np.isin(self.ids, picked)
        self.upper[gone], self.exact[gone] = -np.inf, True

    def offer(self, num: int, tie: float) -> Offer:
        """The `num` farthest points, all in exact order; fewer only if there are no more."""
        num = min(num, int(np.isfinite(self.upper).sum()))
        if num == 0:
            return np.empty(0, np.int64), self.vectors[:0], np.empty(0)
        lower = np.where(self.exact, self.upper, self.upper - 2 * self._slack())
        threshold = np.partition(lower, -num)[-num] - tie
        rivals = np.flatnonzero(self.upper >= threshold)
        self._evaluate(rivals[~self.exact[rivals]])
        rows = rivals[farthest_first(self.upper[rivals], self.ids[rivals], tie)[:num]]
        return self.ids[rows], self.vectors[rows], self.upper[rows]

    def _slack(self) -> Float64[np.ndarray, " n"]:
        """Bound on the float32 error of a squared distance, per row: (d + 8) roundings of |x|^2 + |c|^2."""
        unit = np.finfo(np.float32).eps / 2
        return (self.vectors.shape[1] + 8) * unit * (self.norms + self.center_norm)

    def _evaluate(self, rows: Int64[np.ndarray, " m"]) -> None:
        """Squared distances of some rows to their nearest centres, in float64."""
        for part in np.array_split(rows, 1 + len(rows) * len(self.centers) // _PAIRS):
            self.upper[part] = squared_distances(self.vectors[part], self.centers).min(1)
        self.exact[rows] = True


class LocalShards:
    """Shards in this process."""

    def __init__(self, shards: Sequence[CoresetShard]):
        self.shards = shards

    def broadcast(self, method: Callable[..., T], *arguments: Any) -> list[T]:
        """Call a method on every shard."""
        return [method(shard, *arguments) for shard in self.shards]


def squared_distances(a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "m n"]:
    """All |a_i - b_j|^2 in float64, never negative."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.einsum("md,md->m", a, a)[:, None] + np.einsum("nd,nd->n", b, b)
    return np.maximum(norms - 2 * (a @ b.T), 0)


def farthest_first(squared: Float64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"], tie: float) -> np.ndarray:
    """Positions sorted by falling distance; distances within `tie` of the one before are equal, and go by id."""
    order = np.argsort(-squared, kind="stable")
    level = np.cumsum(np.diff(-squared[order], prepend=-squared[order[:1]]) > tie)
    return order[np.lexsort((ids[order], level))]


def k_center(
    shards: ShardGroup,
    num_selected: int,
    *,
    candidate_batch: int = 256,
    initial_centers: Float[np.ndarray, "m d"] | None = None,
    seed: int = 0,
) -> Selection:
    """Pick `num_selected` ids by greedy farthest-first; the number of shards and `candidate_batch` change no pick.

    Args:
        shards: The pool; ids must be unique over all shards.
        num_selected: Ids to pick.
        candidate_batch: Points every shard offers per round.
        initial_centers: Vectors that count as picked already. Without them the first pick is drawn by `seed` from
            the sorted ids, and everything after it is determined.
        seed: Draws the first pick.

    Raises:
        ConfigError: `num_selected` is not between 1 and the number of points.
        DataError: a vector is not finite.
    """
    summaries = shards.broadcast(CoresetShard.summary)
    ids = np.unique(np.concatenate([ids for ids, _ in summaries]))
    assert len(ids) == sum(len(ids) for ids, _ in summaries), "ids must be unique over all shards"
    if not 1 <= num_selected <= len(ids):
        raise ConfigError(
            f"num_selected must be between 1 and the pool size {len(ids)}, got {num_selected}: "
            "lower the budget or enlarge the pool"
        )
    mean = _rounded_mean(np.sum([sums for _, sums in summaries], axis=0), len(ids))
    tie = TIE * max(shards.broadcast(CoresetShard.center, mean))

    picks: list[int] = []
    reach: list[float] = []
    if initial_centers is None or len(initial_centers) == 0:
        first = int(np.random.default_rng(seed).choice(ids))
        centers, picked = np.concatenate(shards.broadcast(CoresetShard.find, first)), np.array([first])
        picks, reach = [first], [np.inf]
    else:
        centers = np.asarray(initial_centers, np.float32) - mean.astype(np.float32)
        picked = np.empty(0, np.int64)
    shards.broadcast(CoresetShard.absorb, centers, picked)
    while len(picks) < num_selected:
        offers = shards.broadcast(CoresetShard.offer, candidate_batch, tie)
        squared, centers, picked = _pick_certain(offers, num_selected - len(picks), tie)
        shards.broadcast(CoresetShard.absorb, centers, picked)
        picks += picked.tolist()
        reach += squared.tolist()
    left = max(
        (squared.max(initial=0.0) for _, _, squared in shards.broadcast(CoresetShard.offer, 1, tie)), default=0.0
    )
    return Selection(ids=picks, radii=np.sqrt([*reach[1:], left]).tolist())


def _rounded_mean(sums: Float64[np.ndarray, "2 d"], num: int) -> Float64[np.ndarray, " d"]:
    """The mean to a 1024th of each coordinate's magnitude.

    Any point near the mean centres as well. A coarse one is the same for any order of summation, and subtracting it
    rounds no vector of few digits, so that exact ties stay exact.
    """
    if not np.isfinite(sums).all():
        raise DataError("embeddings must be finite, got NaN or infinity: check the embedding model")
    mean, magnitude = sums[0] / num, np.sqrt(sums[1] / num)
    grid = 2.0 ** np.ceil(np.log2(np.maximum(magnitude, np.finfo(np.float32).tiny))) / 1024
    return np.round(mean / grid) * grid


def _pick_certain(offers: Sequence[Offer], num: int, tie: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `num` picks (squared distances, vectors, ids) that no point left unoffered can precede; at least one.

    Everything a shard keeps back comes after the last point of its offer, and distances only fall. So a pick is
    certain as long as it does not come after the earliest of those last points.
    """
    ids, vectors, squared = (np.concatenate(column) for column in zip(*offers, strict=True))
    last = np.cumsum([len(offer[0]) for offer in offers if len(offer[0])]) - 1
    horizon = last[farthest_first(squared[last], ids[last], tie)[0]]
    horizon_squared, horizon_id = squared[horizon], ids[horizon]
    between = squared_distances(vectors, vectors)
    chosen: list[int] = []
    reach: list[float] = []
    while len(chosen) < num:
        farthest = squared.max()
        tied = np.flatnonzero(squared >= farthest - tie)
        pick = tied[np.argmin(ids[tied])]
        beyond = farthest - horizon_squared
        if chosen and (beyond < -tie or (beyond <= tie and ids[pick] > horizon_id)):
            break
        chosen.append(int(pick))
        reach.append(float(squared[pick]))
        squared = np.minimum(squared, between[pick])
        squared[pick] = -np.inf
    return np.array(reach), vectors[chosen], ids[chosen]


def random_selection(ids: Int64[np.ndarray, " n"], num_selected: int, seed: int) -> list[int]:
    """Draw ids uniformly without replacement; the order of `ids` does not matter."""
    if not 1 <= num_selected <= len(ids):
        raise ConfigError(
            f"num_selected must be between 1 and the pool size {len(ids)}, got {num_selected}: "
            "lower the budget or enlarge the pool"
        )
    return np.random.default_rng(seed).choice(np.sort(ids), num_selected, replace=False).tolist()
