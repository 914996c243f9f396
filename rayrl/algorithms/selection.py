"""Selection of the responses that the oracle is asked about: exact greedy k-center over shards, and random selection.

Greedy farthest-first (Sener & Savarese, arXiv 1708.00489) repeats u = argmax_i min_{j in S} d(x_i, x_j) and is within
twice the optimal covering radius. The plain loop reads the whole matrix once per pick. Here each shard offers its
farthest points, the driver picks among the offered as long as no other point can be farther, and each shard then
absorbs all those picks in one matrix product: the same picks, in a fraction of the passes, and only offered vectors
travel.

The picks are exact, whatever the sharding, because float32 products only *bound* distances. Every offered distance is
evaluated again in float64, so is every distance that might rival it, and float64 decides. Points whose squared
distances agree to `TIE` of the data's scale are equally far, and the smallest id goes first. The vectors are centred
before anything else: distances stay, but the float32 bounds get tight where a large common mean, usual in language
model embeddings, would drown them.

This is not an approximate coreset method, and it knows nothing about models, text or Ray: `rayrl.fleets.coreset` wraps
`CoresetShard` into actors and implements `ShardGroup` for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from rayrl.errors import ConfigError, DataError

TIE = 1e-12
"""Squared distances closer than this share of the largest squared norm are equal: float64 rounding, with room."""
MAX_DISTANCES = 1 << 23
"""Distances held in memory at once: 32 MiB in float32."""
MEAN_DIGITS = 1024
"""The subtracted mean is rounded to this share of each coordinate's magnitude."""

T = TypeVar("T")
Offer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids (int64), centred vectors (float32) and squared distances to the nearest centre (float64), farthest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Picks of a strategy."""

    ids: list[int]
    """Distinct ids, in the order they were picked."""
    radii: list[float]
    """`radii[i]`: distance of the worst-covered point once `ids[: i + 1]` (and the initial centres) are centres. Empty
    for a strategy that covers nothing."""


class ShardGroup(Protocol):
    """All shards of a pool, in this process or in others."""

    def broadcast(self, method: Callable[..., T], *arguments: object) -> list[T]:
        """Call a method of `CoresetShard` on every shard; the results are in the shards' order."""
        ...


class CoresetShard:
    """Some of the pool's vectors, with a bound on each one's squared distance to its nearest centre."""

    def __init__(self, ids: Int64[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"]):
        import torch  # not at the top: configs read STRATEGIES, and must load fast

        assert torch.get_float32_matmul_precision() == "highest", "the error bounds are those of full float32"
        self.ids = np.array(ids, np.int64)
        self.vectors = np.array(vectors, np.float32)  # an own copy: `center` works in place
        if self.vectors.ndim != 2 or len(self.ids) != len(self.vectors):
            raise ValueError(f"vectors must be ({len(self.ids)}, d), one row per id, got {self.vectors.shape}")

    def summary(self) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "2 d"]]:
        """The shard's ids, and per coordinate the sum and the sum of squares of its vectors."""
        sums = self.vectors.sum(0, dtype=np.float64)
        squares = np.einsum("nd,nd->d", self.vectors, self.vectors, dtype=np.float64)
        return self.ids, np.stack([sums, squares])

    def center(self, mean: Float64[np.ndarray, " d"]) -> float:
        """Subtract the pool's (rounded) mean, forget all centres, and return the largest squared norm."""
        self.vectors -= mean.astype(np.float32)
        self.norms = np.einsum("nd,nd->n", self.vectors, self.vectors, dtype=np.float64)
        self.centers = np.empty((0, self.vectors.shape[1]))
        # The squared distance to the nearest centre is at most `upper`, and equal to it where `exact`.
        self.upper = np.full(len(self.ids), np.inf)
        self.exact = np.zeros(len(self.ids), np.bool_)
        self.center_norm = 0.0
        return float(self.norms.max(initial=0.0))

    def find(self, identifier: int) -> Float32[np.ndarray, "m d"]:
        """The centred vector of one id: one row, or none if another shard owns it."""
        return self.vectors[self.ids == identifier]

    def absorb(self, centers: Float32[np.ndarray, "m d"], picked: Int64[np.ndarray, " p"]) -> None:
        """Make centred vectors centres, and never offer `picked` again."""
        import torch

        self.centers = np.concatenate([self.centers, centers.astype(np.float64)])
        center_norms = np.einsum("md,md->m", centers, centers, dtype=np.float64)
        self.center_norm = max(self.center_norm, float(center_norms.max()))
        slack = self._slack()
        num_rows = 1 + MAX_DISTANCES // len(centers)
        for start in range(0, len(self.ids), num_rows):
            rows = slice(start, start + num_rows)
            # |x - c|^2 = |x|^2 + |c|^2 - 2 c.x, in float32 but for |x|^2.
            left = torch.from_numpy(-2 * centers)  # pyright: ignore[reportUnknownMemberType]
            right = torch.from_numpy(self.vectors[rows]).T  # pyright: ignore[reportUnknownMemberType]
            products = (left @ right).numpy()  # (m, rows)
            products += center_norms.astype(np.float32)[:, None]
            nearest = products.min(0) + self.norms[rows]
            # An exact distance stays exact only if no new centre can be nearer, whatever the rounding.
            lowest_possible = np.maximum(nearest - slack[rows], 0)
            self.exact[rows] &= lowest_possible >= self.upper[rows]
            np.minimum(self.upper[rows], nearest + slack[rows], out=self.upper[rows])
        is_picked = np.isin(self.ids, picked)
        self.upper[is_picked] = -np.inf  # below every distance, so that `offer` never reaches it
        self.exact[is_picked] = True

    def offer(self, num: int, tie: float) -> Offer:
        """The `num` farthest points, all in exact order; fewer only if there are no more."""
        num_left = int(np.isfinite(self.upper).sum())  # neither picked nor without a centre
        num = min(num, num_left)
        if num == 0:
            return np.empty(0, np.int64), self.vectors[:0], np.empty(0)
        lower = np.where(self.exact, self.upper, self.upper - 2 * self._slack())
        # At least `num` points are as far as the threshold: points that cannot reach it need no evaluation.
        threshold = np.partition(lower, -num)[-num] - tie
        rivals = np.flatnonzero(self.upper >= threshold)
        self._evaluate(rivals[~self.exact[rivals]])
        farthest_rivals = farthest_first(self.upper[rivals], self.ids[rivals], tie)[:num]
        rows = rivals[farthest_rivals]
        return self.ids[rows], self.vectors[rows], self.upper[rows]

    def _slack(self) -> Float64[np.ndarray, " n"]:
        """Bound on the float32 error of a squared distance, per row: (d + 8) roundings of |x|^2 + |c|^2."""
        rounding = np.finfo(np.float32).eps / 2
        num_roundings = self.vectors.shape[1] + 8
        return num_roundings * rounding * (self.norms + self.center_norm)

    def _evaluate(self, rows: Int64[np.ndarray, " m"]) -> None:
        """Compute the squared distances of some rows to their nearest centres in float64."""
        num_parts = 1 + len(rows) * len(self.centers) // MAX_DISTANCES
        for part in np.array_split(rows, num_parts):
            self.upper[part] = squared_distances(self.vectors[part], self.centers).min(1)
        self.exact[rows] = True


class LocalShards:
    """Shards in this process."""

    def __init__(self, shards: Sequence[CoresetShard]):
        self.shards = shards

    def broadcast(self, method: Callable[..., T], *arguments: object) -> list[T]:
        """Call a method on every shard."""
        return [method(shard, *arguments) for shard in self.shards]


def squared_distances(a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "m n"]:
    """All |a_i - b_j|^2 in float64, never negative."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a_norms = np.einsum("md,md->m", a, a)[:, None]  # (m, 1)
    b_norms = np.einsum("nd,nd->n", b, b)  # (n,)
    return np.maximum(a_norms + b_norms - 2 * (a @ b.T), 0)


def farthest_first(squared: Float64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"], tie: float) -> np.ndarray:
    """Positions sorted by falling distance; distances within `tie` of the one before are equal, and go by id."""
    order = np.argsort(-squared, kind="stable")
    falling = -squared[order]
    # A new level begins wherever a distance falls by more than `tie`; within a level the ids decide.
    levels = np.cumsum(np.diff(falling, prepend=falling[:1]) > tie)
    return order[np.lexsort((ids[order], levels))]


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
    ids = np.unique(np.concatenate([shard_ids for shard_ids, _ in summaries]))
    assert len(ids) == sum(len(shard_ids) for shard_ids, _ in summaries), "ids must be unique over all shards"
    _refuse_number(num_selected, len(ids))
    mean = _rounded_mean(np.sum([sums for _, sums in summaries], axis=0), len(ids))
    tie = TIE * max(shards.broadcast(CoresetShard.center, mean))

    picks: list[int] = []
    squared_reach: list[float] = []  # of each pick, its squared distance to the nearest centre when it was picked
    if initial_centers is None or len(initial_centers) == 0:
        first = int(np.random.default_rng(seed).choice(ids))
        centers = np.concatenate(shards.broadcast(CoresetShard.find, first))
        picked = np.array([first])
        picks, squared_reach = [first], [np.inf]
    else:
        centers = np.asarray(initial_centers, np.float32) - mean.astype(np.float32)
        picked = np.empty(0, np.int64)
    shards.broadcast(CoresetShard.absorb, centers, picked)
    while len(picks) < num_selected:
        offers = shards.broadcast(CoresetShard.offer, candidate_batch, tie)
        squared, centers, picked = _pick_certain(offers, num_selected - len(picks), tie)
        shards.broadcast(CoresetShard.absorb, centers, picked)
        picks += picked.tolist()
        squared_reach += squared.tolist()

    # A pick was the worst-covered point before it became a centre, so its reach is the radius of the picks before it.
    # The last radius is the distance of the farthest point that is left.
    remaining = [squared.max(initial=0.0) for _, _, squared in shards.broadcast(CoresetShard.offer, 1, tie)]
    squared_radii = [*squared_reach[1:], max(remaining, default=0.0)]
    return Selection(ids=picks, radii=np.sqrt(squared_radii).tolist())


def _refuse_number(num_selected: int, num_points: int) -> None:
    if not 1 <= num_selected <= num_points:
        raise ConfigError(
            f"select.budget must pick between 1 and all {num_points} candidates, got {num_selected}: "
            "lower the budget, or add prompts to the pool"
        )


def _rounded_mean(sums: Float64[np.ndarray, "2 d"], num: int) -> Float64[np.ndarray, " d"]:
    """The mean to a 1024th of each coordinate's magnitude.

    Any point near the mean centres as well. A coarse one is the same for any order of summation, and subtracting it
    rounds no vector of few digits, so that exact ties stay exact.
    """
    if not np.isfinite(sums).all():
        raise DataError("embeddings must be finite, got NaN or infinity: check the embedding model")
    mean = sums[0] / num
    magnitude = np.sqrt(sums[1] / num)  # root mean square
    # A power of two, so that multiples of the grid have few digits; `tiny` keeps the logarithm of 0 away.
    exponent = np.ceil(np.log2(np.maximum(magnitude, np.finfo(np.float32).tiny)))
    grid = np.power(2.0, exponent) / MEAN_DIGITS
    return np.rint(mean / grid) * grid


def _pick_certain(offers: Sequence[Offer], num: int, tie: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `num` picks (squared distances, vectors, ids) that no point left unoffered can precede; at least one.

    Everything a shard keeps back comes after the last point of its offer, and distances only fall. So a pick is
    certain as long as it does not come after the earliest of those last points, the horizon.
    """
    ids, vectors, squared = (np.concatenate(column) for column in zip(*offers, strict=True))
    sizes = [len(shard_ids) for shard_ids, _, _ in offers if len(shard_ids)]
    last_offered = np.cumsum(sizes) - 1
    horizon = last_offered[farthest_first(squared[last_offered], ids[last_offered], tie)[0]]
    # Read now: `squared` changes below, the bound on the points kept back does not.
    horizon_squared, horizon_id = squared[horizon], ids[horizon]

    between = squared_distances(vectors, vectors)
    chosen: list[int] = []
    reach: list[float] = []
    while len(chosen) < num:
        farthest = squared.max()
        tied = np.flatnonzero(squared >= farthest - tie)
        pick = tied[np.argmin(ids[tied])]
        beyond_horizon = farthest - horizon_squared
        is_past = beyond_horizon < -tie or (beyond_horizon <= tie and ids[pick] > horizon_id)
        # The first pick is certain in any case: it is the farthest of all points.
        if chosen and is_past:
            break
        chosen.append(int(pick))
        reach.append(float(squared[pick]))
        squared = np.minimum(squared, between[pick])
        squared[pick] = -np.inf  # never picked again
    return np.array(reach), vectors[chosen], ids[chosen]


def random_selection(ids: Int64[np.ndarray, " n"], num_selected: int, *, seed: int = 0) -> Selection:
    """Draw ids uniformly without replacement; the order of `ids` does not matter."""
    _refuse_number(num_selected, len(ids))
    drawn = np.random.default_rng(seed).choice(np.sort(ids), num_selected, replace=False)
    return Selection(ids=drawn.tolist(), radii=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to choose the responses that the oracle is asked about, and the input that it reads."""

    choose: Callable[..., Selection]
    """Called as `choose(pool, num_selected, seed=...)`. The pool is an array of ids; for a strategy that reads vectors
    it is a `ShardGroup`, and `candidate_batch` and `initial_centers` are given too, as in `k_center`."""
    reads_vectors: bool
    """Whether the pool has to be embedded."""
    grows: bool = False
    """Whether a larger selection contains the smaller one of the same seed. Otherwise the budget of a run cannot be
    raised: it would ask about others, beyond what it has paid for."""


STRATEGIES: dict[str, Strategy] = {
    "k_center": Strategy(choose=k_center, reads_vectors=True, grows=True),
    "random": Strategy(choose=random_selection, reads_vectors=False),
}
"""Values of `select.strategy`. Config, plan, preflight, selection and report learn of a strategy from its entry."""
