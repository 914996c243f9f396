"""Exact k-center against the plain torch farthest-first loop: seconds, ratio, and whether the picks agree.

    python jobs/bench/k_center.py                 # 100,000 x 384, k = 2,000: minutes
    python jobs/bench/k_center.py --num-points 20000 --num-selected 500

Both sides run with the same threads, interleaved, and start from the same point. Where picks differ, the table shows
the float64 margin between the two first differing picks: at or below 1e-6 both are right.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from hardware import hardware

from rayrl.algorithms.selection import CoresetShard, LocalShards, k_center


def isotropic(num_points: int, dimension: int) -> np.ndarray:
    """Draw unit vectors without structure."""
    return _unit(np.random.default_rng(0).standard_normal((num_points, dimension), np.float32))


def clustered(num_points: int, dimension: int) -> np.ndarray:
    """Draw unit vectors in 200 clusters."""
    rng = np.random.default_rng(0)
    centers = _unit(rng.standard_normal((200, dimension), np.float32))
    noise = rng.standard_normal((num_points, dimension), np.float32) * np.float32(0.5 / dimension**0.5)
    return _unit(centers[rng.integers(0, 200, num_points)] + noise)


def anisotropic(num_points: int, dimension: int) -> np.ndarray:
    """Draw vectors like a language model's hidden states: a large common mean, a few dominating directions."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num_points, dimension), np.float32)
    vectors[:, :8] *= np.linspace(30, 5, 8, dtype=np.float32)
    return vectors + 40 * rng.standard_normal(dimension).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plain(vectors: np.ndarray, num_selected: int, first: int) -> list[int]:
    """Pick farthest-first in the usual way: one float32 matrix-vector product per pick."""
    points = torch.from_numpy(vectors)
    norms = points.square().sum(1)
    nearest = torch.full((len(points),), torch.inf)
    picks = [first]
    while len(picks) < num_selected:
        last = picks[-1]
        nearest = torch.minimum(nearest, norms + norms[last] - 2 * (points @ points[last]))
        nearest[last] = -torch.inf
        picks.append(int(nearest.argmax()))
    return picks


def margin(vectors: np.ndarray, centers: list[int], first: int, second: int) -> float:
    """Return how much farther `first` is than `second` from their nearest centres, in float64."""
    chosen = vectors[centers].astype(np.float64)
    reach = [np.linalg.norm(chosen - vectors[i].astype(np.float64), axis=1).min() for i in (first, second)]
    return float(reach[0] - reach[1])


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    for make in (isotropic, clustered, anisotropic):
        vectors = make(arguments.num_points, arguments.dimension)
        shards = LocalShards(
            [
                CoresetShard(np.arange(len(vectors))[i :: arguments.num_shards], vectors[i :: arguments.num_shards])
                for i in range(arguments.num_shards)
            ]
        )
        fast_s, plain_s, ours, theirs = [], [], [0], [0]
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            ours = k_center(shards, arguments.num_selected, candidate_batch=arguments.candidate_batch).ids
            middle = time.perf_counter()
            theirs = plain(vectors, arguments.num_selected, ours[0])
            plain_s.append(time.perf_counter() - middle)
            fast_s.append(middle - start)
        ratio = statistics.median(p / f for p, f in zip(plain_s, fast_s, strict=True))
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        where = "none" if first is None else f"{first}, {margin(vectors, ours[:first], ours[first], theirs[first]):.1e}"
        yield (
            f"| {make.__name__} | {statistics.median(plain_s):.2f} | {statistics.median(fast_s):.2f} "
            f"| {ratio:.1f} | {equal} of {len(ours)} | {where} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-points", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--num-selected", type=int, default=2_000)
    parser.add_argument("--candidate-batch", type=int, default=256)
    parser.add_argument("--num-shards", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{hardware()}; {arguments.num_points} x {arguments.dimension}, k = {arguments.num_selected}, "
        f"B = {arguments.candidate_batch}, {arguments.num_shards} shard(s), {arguments.threads} threads, "
        f"median of {arguments.repeats}, interleaved\n"
    )
    print("| data | plain torch loop, s | k_center, s | ratio | equal picks | first difference, float64 margin |")
    print("|---|---|---|---|---|---|")
    for row in rows(arguments):
        print(row, flush=True)


if __name__ == "__main__":
    main()
