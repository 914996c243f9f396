"""Random faults, made from outside, in runs on a cluster of several nodes: what is lost, doubled, or paid for twice.

    make chaos                                        # 50 faults in 10 runs, and in 2 with real engines; half an hour
    python -m jobs.bench.chaos --faults 5 --runs 1 --real-runs 0 --seed 7

Every run begins when the one before is over, on the same cluster, and meets its faults at times drawn from the length
of an undisturbed run. A fault whose victim is not there yet waits for it; one whose victim does not come any more is
not counted, and another run makes up for it.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jobs.bench.faults import FAULTS, REAL, REAL_SHORT, SHORT, SIMULATED, Damage, Drive, damage
from jobs.bench.hardware import hardware
from jobs.bench.raylets import Raylets

TIMEOUT_S = 900.0
"""For a run, with all its faults."""


def disturbed(drive: Drive, seconds: float, num_faults: int, draw: random.Random, made: Counter[str]) -> bool:
    """Meet so many faults in about so many seconds; whether the run finished."""
    began = time.monotonic()
    plan = sorted((draw.uniform(0.0, 0.95 * seconds), draw.choice(list(FAULTS))) for _ in range(num_faults))
    for after_s, name in plan:
        time.sleep(max(0.0, began + after_s - time.monotonic()))
        while not drive.is_over() and time.monotonic() - began < TIMEOUT_S:
            if FAULTS[name](drive, draw):
                made[name] += 1
                print(f"    {time.monotonic() - began:5.1f} s  {name}", file=sys.stderr, flush=True)
                break
            time.sleep(0.1)
    code = drive.wait(max(1.0, TIMEOUT_S - (time.monotonic() - began)))
    if code:
        print(f"{drive.folder.name} ended with {code}:\n{drive.log.read_text()[-4000:]}", file=sys.stderr)
    return code == 0


def undisturbed(cluster: Raylets, folder: Path, command: list[str]) -> tuple[Path, float]:
    """What a run leaves that nothing happens to, and how long it takes."""
    began = time.monotonic()
    drive = Drive(cluster=cluster, folder=folder, command=command)
    if drive.wait(TIMEOUT_S):
        raise SystemExit(f"the undisturbed run failed:\n{drive.log.read_text()[-4000:]}")
    return folder, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--runs", type=int, default=10, help="with simulated engines; as many more as it takes")
    parser.add_argument("--real-runs", type=int, default=2, help="among them, with real engines")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    print(f"\n{hardware()}; seed {arguments.seed}; a head without work and two worker nodes\n")
    made, finished, num_runs, found = Counter[str](), 0, 0, list[Damage]()
    kinds = [("real", REAL, REAL_SHORT)] * arguments.real_runs
    kinds += [("simulated", SIMULATED, SHORT)] * (arguments.runs - arguments.real_runs)
    with tempfile.TemporaryDirectory(prefix="rayrl-chaos-") as name, Raylets(Path(name), num_workers=2) as cluster:
        references = {
            kind: undisturbed(cluster, Path(name) / f"undisturbed-{kind}", [*command, *settings])
            for kind, command, settings in dict.fromkeys((k, tuple(c), tuple(s)) for k, c, s in kinds)
        }
        while kinds or made.total() < arguments.faults:
            kind, command, settings = kinds.pop() if kinds else ("simulated", SIMULATED, SHORT)
            reference, seconds = references[kind]
            num_faults = -(-(arguments.faults - made.total()) // (len(kinds) + 1))
            print(f"run {num_runs} ({kind}, {seconds:.0f} s undisturbed)", file=sys.stderr, flush=True)
            drive = Drive(cluster=cluster, folder=Path(name) / f"run-{num_runs}", command=[*command, *settings])
            num_runs += 1
            if disturbed(drive, seconds, num_faults, draw, made):
                finished += 1
                found.append(damage(drive.folder, reference))
    print("| fault | made |\n|---|---|")
    for fault, num in sorted(made.items()):
        print(f"| {fault} | {num} |")
    totals = {name: sum(getattr(one, name) for one in found) for name in Damage.__dataclass_fields__}
    print(f"\n{made.total()} faults in {num_runs} runs, {finished} finished; {totals}")
    ill = [totals[name] for name in ("num_lost", "num_doubled", "num_paid_twice", "num_different")]
    sys.exit(finished < num_runs or any(ill))


if __name__ == "__main__":
    main()
