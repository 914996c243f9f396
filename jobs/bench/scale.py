"""Time and memory from a pool of prompts to preference pairs, at 10,000, 100,000 and 1,000,000 prompts.

    python jobs/bench/scale.py                     # about 8 minutes on two cores
    python jobs/bench/scale.py --sizes 2000 --budget 50

Every stage of the pipeline but the trainings, k = 2 responses a prompt, k-center on 64-d embeddings, 2,000 queries to a
scripted oracle. The engines are simulated (rayrl/engines/simulated.py) and take almost no time, and the evaluator is
not fitted: what is measured is rayrl's own work on the rows. Every size is a fresh process with a fresh Ray.
"""

import argparse
import json
import resource
import tempfile
import time

import ray
from hardware import hardware
from sizes import made_up, measured

from rayrl.fleets.simulated import SimulatedServices
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import start_oracle_pool
from rayrl.records import Checkpoint
from rayrl.runs import storage
from rayrl.runs.run import Run, open_run
from rayrl.runs.stage_table import GENERATE, POOL, PSEUDO_LABEL, QUERY, SELECT
from rayrl.stages.labelling.query import query
from rayrl.stages.proxy.pseudo_label import pseudo_label
from rayrl.stages.rewards.evaluators import evaluator_of
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.select import select

STAGES = (POOL, GENERATE, SELECT, QUERY, PSEUDO_LABEL)
NAMES = [stage.name for stage in STAGES]
BOUND_S = 20 * 60
BOUND_MB = 1500


def all_stages(run: Run) -> int:
    """Run the stages in their order; return the number of pairs."""
    config = run.config
    services = SimulatedServices(run, mode="alternate", reference="generation")
    oracle = start_oracle_pool(
        config.name,
        config.oracle,
        rubric=load_rubric(config.rubric),
        ledger=storage.join(run.url, "ledger.sqlite"),
        budgets={"label": config.select.budget},
    )
    m1, fitted = (Checkpoint(path=config.policy.path, version=version) for version in ("m1", "evaluator"))
    pool = read_pool(run)
    responses = generate(run, services, m1, pool)
    judgements = query(run, oracle, select(run, services, m1, responses))
    pairs = pseudo_label(run, services, m1, evaluator_of(run, fitted, m1), responses, [judgements])
    services.stop()
    ray.kill(oracle)
    return pairs.num_done or 0


def one_size(arguments: argparse.Namespace) -> None:
    """Run the stages in this process and print their times and memory as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        instant = {"request_s": 0.001}
        changes = {
            "generate.k": 2, "generate.block_size": 1000, "select.budget": arguments.budget, "select.num_shards": 2,
            "evaluator.type": "scalar", "generators.num_replicas": 2, "embedders.num_replicas": 2,
            "generators.engine_args": instant, "embedders.engine_args": instant,
        }  # fmt: skip
        config = made_up(folder, arguments.only, changes)
        ray.init(include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        run = open_run(config)
        started = time.monotonic()
        num_pairs = all_stages(run)
        seconds = time.monotonic() - started
        manifests = [run.manifest(stage) for stage in STAGES]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {manifest.stage: manifest.seconds for manifest in manifests if manifest is not None}
    row |= {"all": seconds, "num_pairs": num_pairs, "peak_mb": usage.ru_maxrss / 1024}
    print(json.dumps(row | {"driver_cpu_s": usage.ru_utime + usage.ru_stime}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--only", type=int, help="run one size in this process")
    arguments = parser.parse_args()
    if arguments.only:
        one_size(arguments)
        return
    print(f"\n{hardware()}; seconds\n")
    print(f"| prompts | {' | '.join(NAMES)} | all | us per prompt | pairs | driver CPU, s | driver peak, MB |")
    print("|---" * (len(STAGES) + 6) + "|", flush=True)
    row: dict[str, float] = {}
    for size in arguments.sizes:
        row = measured(__file__, size, "--budget", arguments.budget)
        seconds = " | ".join(f"{row[stage]:.1f}" for stage in (*NAMES, "all"))
        print(
            f"| {size} | {seconds} | {1e6 * row['all'] / size:.0f} | {row['num_pairs']} | {row['driver_cpu_s']:.1f} "
            f"| {row['peak_mb']:.0f} |",
            flush=True,
        )
    holds = row["all"] <= BOUND_S and row["peak_mb"] <= BOUND_MB
    print(f"\nbounds, largest size: {BOUND_S} s and {BOUND_MB} MB: {'hold' if holds else 'BROKEN'}")


if __name__ == "__main__":
    main()
