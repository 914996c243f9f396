"""Recovery times of a run: from a replica's kill to full strength, from the driver's kill to the first new row.

    python -m jobs.bench.recovery                # ten minutes
    python -m jobs.bench.recovery --rounds 1 --kinds simulated

On a cluster of a head without work and two worker nodes, in the midst of `generate`, with two replicas. Simulated
engines start at once: the time is Ray's and rayrl's. Real ones are vLLM's with the quickstart's model. The driver is
started again as soon as it is gone; what it has written is not written again.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from jobs import rehearsal
from jobs.bench.hardware import hardware
from rayrl.fleets.connection import NAMESPACE
from rayrl.fleets.local_cluster import LocalCluster, kill_process, wait_until
from rayrl.fleets.local_faults import LocalRun, kill, kill_driver

WAIT_S = 300.0
QUICKSTART = [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml"]
LONG = ["pool.limit=1000", "pool.num_eval=16", "generators.num_replicas=2", "generate.block_size=4", "generate.k=2"]
KINDS = {
    "simulated": [*rehearsal.PROXY_DPO, *LONG],
    "real": [*QUICKSTART, "sft.enabled=false", "generate.max_tokens=24", *LONG],
}


def parts(run: LocalRun) -> int:
    """Count the blocks of responses that are written."""
    return len(list((run.folder / "stages" / "generate" / "table").glob("part-*.parquet")))


def ready(router: Any) -> int:
    """Ask a router for its number of ready replicas."""
    state: Any = ray.get(router.state.remote(), timeout=WAIT_S)
    return state["ready"]


def replica(run: LocalRun) -> tuple[float, float]:
    """Kill a replica; return the seconds until the router notices, and until both replicas answer again."""
    wait_until(lambda: parts(run) >= 3, WAIT_S, "the first blocks")
    router = ray.get_actor(f"{run.folder.name}-generators-router", namespace=NAMESPACE)
    wait_until(lambda: ready(router) == 2, WAIT_S, "both replicas")
    kill("Generator")(run, random.Random(0))
    began = time.monotonic()
    wait_until(lambda: ready(router) < 2, WAIT_S, "the router to notice")
    noticed = time.monotonic() - began
    wait_until(lambda: ready(router) == 2, WAIT_S, "both replicas again")
    return noticed, time.monotonic() - began


def driver(run: LocalRun) -> float:
    """Kill the driver; return the seconds until its successor writes its first block."""
    before = parts(run)
    began = time.monotonic()
    kill_driver(run, random.Random(0))
    before = max(before, parts(run))
    wait_until(lambda: parts(run) > before, WAIT_S, "a new block")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    print(f"\n{hardware()}; median of {arguments.rounds}, and the largest\n")
    print("| engines | replica killed: noticed after | both answer after | driver killed: new row after |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="rayrl-recovery-") as name, LocalCluster(Path(name)) as cluster:
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False)
        for kind in arguments.kinds:
            rows = []
            for number in range(arguments.rounds):
                run = LocalRun(cluster=cluster, folder=Path(name) / f"{kind}-{number}", command=KINDS[kind])
                try:
                    rows.append((*replica(run), driver(run)))
                finally:
                    kill_process(run.driver)
            cells = [f"{statistics.median(of):.1f} s ({max(of):.1f})" for of in zip(*rows, strict=True)]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
