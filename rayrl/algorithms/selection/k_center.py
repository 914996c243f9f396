"""Exact greedy k-center over shards.

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
`CoresetShard` into actors.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from rayrl.algorithms.selection.shards import (
    Selection,
    ShardGroup,
    VectorShard,
    center_pool,
    find_vectors,
    left_of,
    refuse_number,
)

TIE = 1e-12
"""Squared distances closer than this share of the largest squared norm are equal: float64 rounding, with room."""
MAX_DISTANCES = 1 << 23
"""Distances held in memory at once: 32 MiB in float32."""
Offer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids (int64), centred vectors (float32) and squared distances to the nearest centre (float64), farthest first."""


class CoresetShard(VectorShard):
    """A shard that also bounds each vector's squared distance to its nearest centre."""

    def __init__(self, ids: Int64[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"]):
        import torch  # not at the top: configs read the table of strategies, and must load fast

        assert torch.get_float32_matmul_precision() == "highest", "the error bounds are those of full float32"
        super().__init__(ids, vectors)

    def begin(self) -> None:
        """Forget all centres."""
        self.centers = np.empty((0, self.vectors.shape[1]))
        # The squared distance to the nearest centre is at most `upper`, and equal to it where `exact`.
        self.upper = np.full(len(self.ids), np.inf)
        self.exact = np.zeros(len(self.ids), np.bool_)
        self.center_norm = 0.0

    def exclude(self, identifiers: Int64[np.ndarray, " m"]) -> None:
        """Never offer some ids."""
        rows = self.rows_of(identifiers)
        self.upper[rows] = -np.inf  # below every distance, so that `offer` never reaches it
        self.exact[rows] = True

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
        self.exclude(picked)

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
    taken: Int64[np.ndarray, " t"] | None = None,
    allowed: Int64[np.ndarray, " a"] | None = None,
    seed: int = 0,
) -> Selection:
    """Pick `num_selected` ids by greedy farthest-first; the number of shards and `candidate_batch` change no pick.

    Args:
        shards: The pool; ids must be unique over all shards.
        num_selected: Ids to pick.
        candidate_batch: Points every shard offers per round.
        initial_centers: Vectors that count as picked already. Without them and `taken` the first pick is drawn by
            `seed` from the sorted ids, and everything after it is determined.
        taken: Ids that were picked before: centres that are not picked again.
        allowed: Ids that may be picked; None is all.
        seed: Draws the first pick.

    Raises:
        ConfigError: `num_selected` is not between 1 and the number of points.
        DataError: a vector is not finite.
    """
    pool = center_pool(shards)
    taken = np.empty(0, np.int64) if taken is None else taken
    left = left_of(pool.ids, taken)
    if allowed is not None:
        left = np.intersect1d(left, allowed)
    refuse_number(num_selected, len(left))
    tie = TIE * pool.largest_norm
    shards.broadcast(CoresetShard.begin)
    if allowed is not None:
        shards.broadcast(CoresetShard.exclude, left_of(pool.ids, left))

    picks: list[int] = []
    squared_reach: list[float] = []  # of each pick, its squared distance to the nearest centre when it was picked
    known = [] if initial_centers is None else [np.asarray(initial_centers, np.float32) - pool.offset]
    known += [find_vectors(shards, taken)] if len(taken) else []
    centers = np.concatenate(known) if known else np.empty((0, 1), np.float32)
    picked = taken
    if len(centers) == 0:
        first = int(np.random.default_rng(seed).choice(left))
        picked = np.array([first])
        centers = find_vectors(shards, picked)
        picks, squared_reach = [first], [np.inf]
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
