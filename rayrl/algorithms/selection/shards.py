"""Shards of a pool's vectors, on which every strategy of selection works, and the knowledge that it is given.

A pool is split over shards, in this process or in others (`rayrl.fleets.coreset`). A strategy runs functions on all of
them at once and sees ids and the few vectors that they offer, never the whole pool. The number of shards changes no
pick: values are compared, or drawn by the ids, and never by a position.

Ids are whole numbers, and `id // prompt_stride` is the prompt of a response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from rayrl.algorithms.heads import Heads
from rayrl.errors import ConfigError, DataError

MEAN_DIGITS = 1024
"""The subtracted mean is rounded to this share of each coordinate's magnitude."""
ROWS_AT_ONCE = 65536
"""Rows that are converted to float64 at once."""
EQUAL_DIGITS = 9
"""Values that agree to so many digits of the largest one are equal, and the smallest id goes first."""

T = TypeVar("T")


def _no_ids() -> Int64[np.ndarray, " 0"]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Picks of a strategy."""

    ids: list[int]
    """Distinct ids, in the order they were picked; of a strategy that asks about pairs two by two."""
    radii: list[float] = field(default_factory=list)
    """`radii[i]`: distance of the worst-covered point once `ids[: i + 1]` (and the initial centres) are centres. Empty
    for a strategy that covers nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What a strategy is told besides the pool."""

    seed: int = 0
    """All that it draws follows from it."""
    taken: Int64[np.ndarray, " t"] = field(default_factory=_no_ids)
    """Ids that were asked about before: never picked again, and covered already."""
    initial_centers: Float[np.ndarray, "m d"] | None = None
    """Vectors from outside of the pool that count as labelled: covered already."""
    heads: Heads | None = None
    """Fitted on the labels so far; None as long as there are none."""
    entropies: Float64[np.ndarray, " n"] | None = None
    """Of the evaluator's score of every response of the pool, by rising id; NaN where it abstains."""
    sure_margin: float = float("inf")
    """Margin between two responses, in the heads' standard deviations, from which on their order counts as known."""
    prompt_stride: int = 1
    """`id // prompt_stride` is the prompt of a response."""
    candidate_batch: int = 256
    """Points that each shard offers at a time; changes the speed, never the picks."""


class VectorShard:
    """Some of the pool's vectors."""

    def __init__(self, ids: Int64[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"]):
        self.ids = np.array(ids, np.int64)
        self.vectors = np.array(vectors, np.float32)  # an own copy: `center` works in place
        if self.vectors.ndim != 2 or len(self.ids) != len(self.vectors):
            raise ValueError(f"vectors must be ({len(self.ids)}, d), one row per id, got {self.vectors.shape}")
        self.offset = np.zeros(self.vectors.shape[1], np.float32)
        self.norms = np.empty(0)
        self.work: object = None
        """State of the strategy that works on the shard."""

    def summary(self) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "2 d"]]:
        """The shard's ids, and per coordinate the sum and the sum of squares of its vectors."""
        sums = self.vectors.sum(0, dtype=np.float64)
        squares = np.einsum("nd,nd->d", self.vectors, self.vectors, dtype=np.float64)
        return self.ids, np.stack([sums, squares])

    def center(self, mean: Float64[np.ndarray, " d"]) -> tuple[float, Float32[np.ndarray, " d"]]:
        """Subtract the pool's (rounded) mean, and forget all work.

        Returns:
            The largest squared norm, and all that was subtracted so far.
        """
        self.vectors -= mean.astype(np.float32)
        self.offset += mean.astype(np.float32)
        self.norms = np.einsum("nd,nd->n", self.vectors, self.vectors, dtype=np.float64)
        self.work = None
        return float(self.norms.max(initial=0.0)), self.offset

    def find(self, identifiers: Int64[np.ndarray, " m"]) -> tuple[Int64[np.ndarray, " f"], Float32[np.ndarray, "f d"]]:
        """Those of some ids that this shard owns, and their centred vectors."""
        owned = np.isin(self.ids, identifiers)
        return self.ids[owned], self.vectors[owned]

    def head_scores(self, heads: Heads) -> Float64[np.ndarray, "n m"]:
        """Every head's score of every vector, in one matrix product.

        In float64: the last digits of a float32 product depend on the size of the shard, and ties with them.
        """
        weights = heads.weights.astype(np.float64)
        # The heads were fitted on vectors as they were before they were centred.
        bias = heads.bias + self.offset.astype(np.float64) @ weights
        parts = np.array_split(self.vectors, 1 + len(self.vectors) // ROWS_AT_ONCE)
        return np.concatenate([part.astype(np.float64) @ weights for part in parts]) + bias

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.vectors.shape[1]

    def vectors_at(self, rows: np.ndarray | slice) -> Float32[np.ndarray, "m d"]:
        """The vectors of some rows."""
        return self.vectors[rows]

    def rows_of(self, identifiers: Int64[np.ndarray, " m"]) -> np.ndarray:
        """Positions of those of some ids that this shard owns."""
        return np.flatnonzero(np.isin(self.ids, identifiers))


class ShardGroup(Protocol):
    """All shards of a pool, in this process or in others."""

    def broadcast(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Call `function(shard, *arguments)` on every shard; the results are in the shards' order."""
        ...


class LocalShards:
    """Shards in this process."""

    def __init__(self, shards: Sequence[VectorShard]):
        self.shards = shards

    def broadcast(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Call a function on every shard."""
        return [function(shard, *arguments) for shard in self.shards]


@dataclass(frozen=True, slots=True, kw_only=True)
class CenteredPool:
    """What a strategy learns of a pool as it centres it."""

    ids: Int64[np.ndarray, " n"]
    """All ids, sorted."""
    offset: Float32[np.ndarray, " d"]
    """What was subtracted, now and before: a vector from outside is comparable without it."""
    largest_norm: float
    """The largest squared norm of a centred vector."""
    mean_norm: float
    """The mean squared norm, about."""


def center_pool(shards: ShardGroup) -> CenteredPool:
    """Subtract the pool's mean from all vectors: distances stay, and large common means drown nothing.

    Raises:
        DataError: a vector is not finite.
    """
    summaries = shards.broadcast(VectorShard.summary)
    ids = np.unique(np.concatenate([shard_ids for shard_ids, _ in summaries]))
    assert len(ids) == sum(len(shard_ids) for shard_ids, _ in summaries), "ids must be unique over all shards"
    sums = np.sum([shard_sums for _, shard_sums in summaries], axis=0)
    mean = _rounded_mean(sums, len(ids))
    mean_norm = float((sums[1] / len(ids) - (sums[0] / len(ids)) ** 2).clip(0).sum())
    centered = shards.broadcast(VectorShard.center, mean)
    return CenteredPool(
        ids=ids, offset=centered[0][1], largest_norm=max(norm for norm, _ in centered), mean_norm=mean_norm
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


def find_vectors(shards: ShardGroup, identifiers: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
    """The vectors of some ids, in the order of `identifiers`."""
    found = shards.broadcast(VectorShard.find, identifiers)
    ids = np.concatenate([shard_ids for shard_ids, _ in found])
    vectors = np.concatenate([shard_vectors for _, shard_vectors in found])
    assert len(ids) == len(identifiers), "every id must be one of the pool's"
    order = np.argsort(ids)
    return vectors[order[np.searchsorted(ids[order], identifiers)]]


def left_of(ids: Int64[np.ndarray, " n"], taken: Int64[np.ndarray, " t"]) -> Int64[np.ndarray, " l"]:
    """The sorted ids that may still be picked."""
    return np.setdiff1d(ids, taken)


def refuse_number(num_selected: int, num_points: int) -> None:
    """Refuse to pick nothing, or more than there is.

    Raises:
        ConfigError: `num_selected` is not between 1 and `num_points`.
    """
    if not 1 <= num_selected <= num_points:
        raise ConfigError(
            f"select.budget must pick between 1 and all {num_points} candidates, got {num_selected}: "
            "lower the budget, or add prompts to the pool"
        )


def uniform_of(ids: Int64[np.ndarray, " n"], *draw: int) -> Float64[np.ndarray, " n"]:
    """A number in (0, 1) for each id, drawn by the ids and the numbers of the draw: SplitMix64 (Steele et al., 2014).

    The draw of an id is the same wherever, and beside whatever, it is computed.
    """
    state = ids.astype(np.uint64)
    for number in draw:
        state = _mixed(state ^ _mixed(np.uint64(number & 0xFFFFFFFFFFFFFFFF)))
    return ((_mixed(state) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def mixed_ids(ids: Int64[np.ndarray, " n"], numbers: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Ids whose draws are independent of each other for different numbers: one more number, of each id its own."""
    return (_mixed(ids.astype(np.uint64)) ^ _mixed(_mixed(numbers.astype(np.uint64)))).astype(np.int64)


def _mixed(state: np.ndarray | np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.asarray(state, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def largest_first(values: Float64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"], scale: float) -> np.ndarray:
    """Positions sorted by falling value; values that agree to `EQUAL_DIGITS` of the scale go by their ids."""
    unit = scale * 10.0**-EQUAL_DIGITS
    return np.lexsort((ids, -np.rint(values / unit) if unit else -values))


def largest(
    shards: ShardGroup, num: int, offer: Callable[..., tuple[np.ndarray, np.ndarray]], *arguments: object
) -> np.ndarray:
    """The ids of the `num` largest values of all shards, largest first.

    Args:
        shards: the pool.
        num: ids to return; all that are offered, where these are fewer.
        offer: run on each shard as `offer(shard, num, *arguments)`; its `num` largest values with their ids, which may
            be rows of several.
        arguments: of `offer`.
    """
    offers = shards.broadcast(offer, num, *arguments)
    ids = np.concatenate([shard_ids for shard_ids, _ in offers])
    values = np.concatenate([shard_values for _, shard_values in offers])
    scale = float(np.abs(values).max(initial=0.0))
    first_ids = ids if ids.ndim == 1 else ids[:, 0]
    return ids[largest_first(values, first_ids, scale)[:num]]


def top(values: Float64[np.ndarray, " n"], ids: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids (or rows of ids) with the `num` largest values, and these; all values that tie with the last are kept."""
    if len(values) > num:
        scale = float(np.abs(values).max())
        threshold = np.partition(values, -num)[-num] - scale * 10.0**-EQUAL_DIGITS
        kept = values >= threshold
        ids, values = ids[kept], values[kept]
    return ids, values
