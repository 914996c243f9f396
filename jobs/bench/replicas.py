"""Throughput of stage `generate` with 1 to 64 replicas: what rayrl itself costs as a fleet grows.

    python jobs/bench/replicas.py                  # a minute per size
    python jobs/bench/replicas.py --sizes 1 4 --requests-per-replica 320

The replicas are simulated (rayrl/engines/simulated.py: requests of 0.5 s, 32 at once), so that all of them fit on this
machine and what is measured is the rest: the router, the blocks' tasks, the tables, the driver. Every size is a
fresh process with a fresh Ray, and the same number of requests for each replica. The fleet is up before the clock
runs, and so are the processes of Ray Data's tasks: a first round of two blocks per replica, at its best 4 s, comes
before, and its time is shown. A replica's best is 64 requests/s; linear is what one replica did, times their
number.
"""

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace

import ray
from hardware import hardware
from sizes import made_up, measured

from rayrl.fleets.simulated import SimulatedServices
from rayrl.records import Checkpoint
from rayrl.runs.run import open_run
from rayrl.runs.stage_table import GENERATE
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool

K = 2
BLOCK_SIZE = 64
"""Prompts, the default of `generate.block_size`: with K responses each, four times the requests that a replica runs at
once."""
FIRST = 2
"""Blocks of the first round, per replica."""
BOUND = 0.9
WARM_UP = replace(GENERATE, name="warm_up")
"""A first round before the clock, in a folder of its own."""


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one_size(arguments: argparse.Namespace) -> None:
    """Run the stage in this process and print its times and memory as JSON."""
    num_requests = arguments.only * arguments.requests_per_replica
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "generate.k": K, "generate.block_size": BLOCK_SIZE, "generators.num_replicas": arguments.only,
            "generators.max_num_seqs": 32, "generators.engine_args": {"request_s": arguments.request_s},
        }  # fmt: skip
        config = made_up(folder, num_requests // K, changes)
        ray.init(include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        run = open_run(config)
        pool = read_pool(run)
        services = SimulatedServices(run, mode="overlap", reference="generation")
        m1 = Checkpoint(path=config.policy.path, version="m1")
        services.ready(services.generators(m1))
        started = time.monotonic()
        first = replace(pool.train, num_blocks=min(pool.train.num_blocks, FIRST * arguments.only))
        generate(run, services, m1, replace(pool, train=first), stage=WARM_UP)
        first_s = time.monotonic() - started
        started, before = time.monotonic(), cpu_s()
        responses = generate(run, services, m1, pool)
        seconds, cpu = time.monotonic() - started, cpu_s() - before
        services.stop()
        assert responses.num_responses == num_requests, responses
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"first_s": first_s, "seconds": seconds, "driver_cpu_s": cpu, "driver_peak_mb": peak_mb}
    print(json.dumps(row | {"requests": num_requests}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--requests-per-replica", type=int, default=2560)
    parser.add_argument("--request-s", type=float, default=0.5)
    parser.add_argument("--only", type=int, help="run one size in this process")
    arguments = parser.parse_args()
    if arguments.only:
        one_size(arguments)
        return
    print(f"\n{hardware()}; {arguments.requests_per_replica} requests of {arguments.request_s} s for each replica\n")
    print("| replicas | first round, s | seconds | requests/s | of linear | driver CPU, s | driver peak, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    options = ["--requests-per-replica", arguments.requests_per_replica, "--request-s", arguments.request_s]
    shares: list[float] = []
    alone = 0.0
    for size in arguments.sizes:
        row = measured(__file__, size, *options)
        rate = row["requests"] / row["seconds"]
        alone = alone or rate / size
        shares.append(rate / size / alone)
        print(
            f"| {size} | {row['first_s']:.1f} | {row['seconds']:.1f} | {rate:.0f} | {shares[-1]:.3f} "
            f"| {row['driver_cpu_s']:.1f} | {row['driver_peak_mb']:.0f} |",
            flush=True,
        )
    holds = shares[-1] >= BOUND
    print(f"\nbound at {arguments.sizes[-1]}: {BOUND} of linear, {'holds' if holds else 'BROKEN'}")


if __name__ == "__main__":
    main()
