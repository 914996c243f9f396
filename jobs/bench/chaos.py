"""Random faults in runs on a cluster of several nodes; counts the rows lost, doubled and paid for twice.

    make chaos                                        # 50 faults in 10 runs, 2 of them with real engines; half an hour
    python -m jobs.bench.chaos --faults 5 --runs 1 --real-runs 0 --seed 7

Runs follow one another on the same cluster. The times of a run's faults are drawn from the length of an undisturbed
run. A fault whose victim does not exist yet waits for it. One whose victim never appears is not counted, and another
run makes up for it.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jobs import rehearsal
from jobs.bench.hardware import hardware
from rayrl.fleets.local_cluster import LocalCluster
from rayrl.fleets.local_faults import FAULTS, Damage, LocalRun, damage

REAL = [
    sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml",
    "pool.limit=60", "pool.num_eval=12", "generate.k=2", "generate.block_size=8", "generate.max_tokens=24",
    "sft.enabled=false", "select.budget=24", "oracle.max_concurrency=2", "evaluator.epochs=2",
    "evaluator.checkpoint_every=2", "evaluator.max_failures=20", "dpo.epochs=1", "dpo.max_failures=20",
    "evaluate.budget=24",
]  # fmt: skip
"""A short quickstart with vLLM's engines, on two cores."""

TIMEOUT_S = 900.0
"""Longest time of a run with all its faults."""


def disturbed(run: LocalRun, seconds: float, num_faults: int, draw: random.Random, made: Counter[str]) -> bool:
    """Make `num_faults` faults within about `seconds`; return whether the run finished."""
    began = time.monotonic()
    plan = sorted((draw.uniform(0.0, 0.95 * seconds), draw.choice(list(FAULTS))) for _ in range(num_faults))
    for after_s, name in plan:
        time.sleep(max(0.0, began + after_s - time.monotonic()))
        while not run.is_over() and time.monotonic() - began < TIMEOUT_S:
            if FAULTS[name](run, draw):
                made[name] += 1
                print(f"    {time.monotonic() - began:5.1f} s  {name}", file=sys.stderr, flush=True)
                break
            time.sleep(0.1)
    code = run.wait(max(1.0, TIMEOUT_S - (time.monotonic() - began)))
    if code:
        print(f"{run.folder.name} ended with {code}:\n{run.log.read_text()[-4000:]}", file=sys.stderr)
    return code == 0


def undisturbed(cluster: LocalCluster, folder: Path, command: list[str]) -> tuple[Path, float]:
    """Run without faults; return the folder and the seconds it took."""
    began = time.monotonic()
    run = LocalRun(cluster=cluster, folder=folder, command=command)
    if run.wait(TIMEOUT_S):
        raise SystemExit(f"the undisturbed run failed:\n{run.log.read_text()[-4000:]}")
    return folder, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--runs", type=int, default=10, help="runs in all; more follow until all faults are made")
    parser.add_argument("--real-runs", type=int, default=2, help="how many of them have real engines")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    print(f"\n{hardware()}; seed {arguments.seed}; a head without work and two worker nodes\n")
    made = Counter[str]()
    finished = 0
    num_runs = 0
    found: list[Damage] = []
    commands = {"real": REAL, "simulated": rehearsal.PROXY_DPO}
    kinds = ["real"] * arguments.real_runs + ["simulated"] * (arguments.runs - arguments.real_runs)
    with tempfile.TemporaryDirectory(prefix="rayrl-chaos-") as name, LocalCluster(Path(name), num_workers=2) as cluster:
        references = {
            kind: undisturbed(cluster, Path(name) / f"undisturbed-{kind}", commands[kind])
            for kind in dict.fromkeys(kinds)
        }
        while kinds or made.total() < arguments.faults:
            kind = kinds.pop() if kinds else "simulated"
            reference, seconds = references[kind]
            num_faults = math.ceil((arguments.faults - made.total()) / (len(kinds) + 1))
            print(f"run {num_runs} ({kind}, {seconds:.0f} s undisturbed)", file=sys.stderr, flush=True)
            run = LocalRun(cluster=cluster, folder=Path(name) / f"run-{num_runs}", command=commands[kind])
            num_runs += 1
            if disturbed(run, seconds, num_faults, draw, made):
                finished += 1
                found.append(damage(run.folder, reference))
    print("| fault | made |\n|---|---|")
    for fault, num in sorted(made.items()):
        print(f"| {fault} | {num} |")
    totals = {name: sum(getattr(one, name) for one in found) for name in Damage.__dataclass_fields__}
    print(f"\n{made.total()} faults in {num_runs} runs, {finished} finished; {totals}")
    ill = [totals[name] for name in ("num_lost", "num_doubled", "num_paid_twice", "num_different")]
    sys.exit(finished < num_runs or any(ill))


if __name__ == "__main__":
    main()
