"""Every strategy on a large pool: seconds, peak memory, and a plain implementation beside it.

    python jobs/bench/strategies.py                                # 1,000,000 x 384, 10,000 labels: an hour on 2 cores
    python jobs/bench/strategies.py --num-points 20000 --num-selected 500 --only d_optimal k_means_pp

Each strategy runs in a process of its own, so that its peak memory is its own, or that of making the vectors, which
takes three times their size. Vectors are of length 1 in 200 clusters, `--per-prompt` responses a prompt; heads are
fitted on 500 labels. The plain implementations take one pass over the pool for each pick, and are timed on as many
picks as `--plain-picks`, from which the whole is extrapolated.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from hardware import hardware
from k_center import clustered

from rayrl.algorithms.heads import fit_heads, fit_pair_heads
from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards

NUM_LABELS = 500
STRIDE = 64


def heads_on(vectors: np.ndarray, prompts: np.ndarray, *, pairs: bool):
    rng = np.random.default_rng(1)
    rows = np.arange(2 * NUM_LABELS)
    true = rng.standard_normal(vectors.shape[1])
    if pairs:
        differences = vectors[rows[::2]] - vectors[rows[1::2]]
        return fit_pair_heads(differences, differences @ true > 0, rows[::2])
    return fit_heads(vectors[rows], vectors[rows] @ true + rng.standard_normal(len(rows)), prompts[rows])


def plain_d_optimal(vectors: np.ndarray, num: int) -> None:
    """One rank-one update, and one pass over all leverages, a pick."""
    x = torch.from_numpy(vectors - vectors.mean(0))
    inverse = torch.eye(x.shape[1])
    leverage = (x @ inverse * x).sum(1)
    for _ in range(num):
        along = inverse @ x[int(leverage.argmax())]
        fall = along / (1 + float(leverage.max())) ** 0.5
        inverse -= torch.outer(fall, fall)
        leverage -= (x @ fall) ** 2


def plain_far(vectors: np.ndarray, num: int) -> None:
    """One pass over all distances a pick, as k-means++ and farthest-first take it."""
    x = torch.from_numpy(vectors)
    norms = x.square().sum(1)
    nearest = torch.full((len(x),), torch.inf)
    pick = 0
    for _ in range(num):
        nearest = torch.minimum(nearest, norms + norms[pick] - 2 * (x @ x[pick]))
        pick = int(nearest.argmax())


PLAIN = {"d_optimal": plain_d_optimal, "k_means_pp": plain_far, "badge": plain_far, "k_center": plain_far}


def one(arguments: argparse.Namespace, name: str) -> None:
    """Time one strategy in this process."""
    torch.set_num_threads(arguments.threads)
    vectors = clustered(arguments.num_points, arguments.dimension)
    strategy = STRATEGIES[name]
    prompts, places = np.divmod(np.arange(len(vectors)), arguments.per_prompt)
    ids = prompts * STRIDE + places
    heads = heads_on(vectors, prompts, pairs=strategy.asks == "pairs")
    pool = LocalShards([CoresetShard(ids, vectors)]) if strategy.reads_vectors else ids
    knowledge = Knowledge(heads=heads, entropies=np.random.default_rng(2).random(len(ids)), prompt_stride=STRIDE)
    started = time.perf_counter()
    picks = strategy.choose(pool, arguments.num_selected, knowledge).ids
    seconds = time.perf_counter() - started
    assert len(set(picks)) == len(picks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the plain loop, which has its own copies
    plain_s = 0.0
    if name in PLAIN:
        started = time.perf_counter()
        PLAIN[name](vectors, arguments.plain_picks)
        plain_s = (time.perf_counter() - started) / arguments.plain_picks * arguments.num_selected
    beside = f"{plain_s:,.0f} | {plain_s / seconds:.1f}" if plain_s else "- | -"
    print(f"| {name} | {seconds:,.1f} | {beside} | {peak:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-points", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--num-selected", type=int, default=10_000)
    parser.add_argument("--per-prompt", type=int, choices=range(2, STRIDE + 1), default=4, metavar="K")
    parser.add_argument("--plain-picks", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--one", choices=list(STRATEGIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments, arguments.one)
        return
    print(
        f"{hardware()}; {arguments.num_points:,} x {arguments.dimension}, {arguments.num_selected:,} picks, "
        f"{arguments.threads} threads\n"
    )
    print("| strategy | s | plain, s (extrapolated) | ratio | peak memory, GiB |")
    print("|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], check=True)


if __name__ == "__main__":
    main()
