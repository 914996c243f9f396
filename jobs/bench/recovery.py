"""How long a run takes to recover: from a replica's kill to full strength, from the driver's kill to the first new row.

    python -m jobs.bench.recovery                # ten minutes
    python -m jobs.bench.recovery --rounds 1 --kinds simulated

On a cluster of a head without work and two worker nodes, in the midst of `generate`, with two replicas. Simulated
engines start at once: what is left is Ray's and ours. Real ones are vLLM's with the quickstart's model. The driver is
started again the moment it is gone; what it has written is not written again.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from jobs.bench.faults import REAL, SHORT, SIMULATED, Drive, kill, kill_driver
from jobs.bench.hardware import hardware
from jobs.bench.raylets import Raylets, end, until
from rayrl.fleets.control import NAMESPACE

WAIT_S = 300.0
LONG = ["pool.limit=1000", "pool.num_eval=16", "generators.num_replicas=2", "generate.block_size=4", "generate.k=2"]
KINDS = {
    "simulated": [*SIMULATED, *SHORT, *LONG],
    "real": [*REAL, "sft.enabled=false", "generate.max_tokens=24", *LONG],
}


def parts(drive: Drive) -> int:
    """Blocks of responses that are written."""
    return len(list((drive.folder / "stages" / "generate" / "table").glob("part-*.parquet")))


def ready(router: Any) -> int:
    """Replicas that are."""
    state: Any = ray.get(router.state.remote(), timeout=WAIT_S)
    return state["ready"]


def replica(drive: Drive) -> tuple[float, float]:
    """Seconds from a replica's kill until the router knows, and until both answer again."""
    until(lambda: parts(drive) >= 3, WAIT_S, "the first blocks")
    router = ray.get_actor(f"{drive.folder.name}-generators-router", namespace=NAMESPACE)
    until(lambda: ready(router) == 2, WAIT_S, "both replicas")
    kill("Generator")(drive, random.Random(0))
    began = time.monotonic()
    until(lambda: ready(router) < 2, WAIT_S, "the router to notice")
    noticed = time.monotonic() - began
    until(lambda: ready(router) == 2, WAIT_S, "both replicas again")
    return noticed, time.monotonic() - began


def driver(drive: Drive) -> float:
    """Seconds from the driver's kill to the first block that its successor writes."""
    before = parts(drive)
    began = time.monotonic()
    kill_driver(drive, random.Random(0))
    before = max(before, parts(drive))
    until(lambda: parts(drive) > before, WAIT_S, "a new block")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    print(f"\n{hardware()}; median of {arguments.rounds}, and the largest\n")
    print("| engines | replica killed: noticed after | both answer after | driver killed: new row after |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="rayrl-recovery-") as name, Raylets(Path(name)) as cluster:
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False)
        for kind in arguments.kinds:
            rows = []
            for number in range(arguments.rounds):
                drive = Drive(cluster=cluster, folder=Path(name) / f"{kind}-{number}", command=KINDS[kind])
                try:
                    rows.append((*replica(drive), driver(drive)))
                finally:
                    end(drive.driver)
            cells = [f"{statistics.median(of):.1f} s ({max(of):.1f})" for of in zip(*rows, strict=True)]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
