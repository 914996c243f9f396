"""Time from pressing Enter to a plan, or to a refusal: each command in a new process, as a user starts it.

    python jobs/bench/command_line.py [--repeats 5]

Prints the median and the longest wall time of each command, and the seconds of CPU it takes, which other work on the
machine changes little.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOB, QUICKSTART = "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml"
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "--plan, proxy DPO": ([JOB, QUICKSTART, "--plan"], {}),
    "--plan, reward learning": (["jobs/rlp.py", "jobs/configs/rlp_quickstart.toml", "--plan"], {}),
    "rayrl plan": (["-m", "rayrl.cli", "plan", QUICKSTART], {}),
    "a wrong value": ([JOB, QUICKSTART, "select.budget=-1"], {}),
    "a model that is not here": ([JOB, QUICKSTART, "policy.path=someone/a-model"], {}),
    "an unknown engine argument": ([JOB, QUICKSTART, "generators.engine_args.x=1"], {}),
    "a judge that does not answer": (
        [JOB, QUICKSTART, 'oracle={type="http", base_url="http://127.0.0.1:9/v1", model="m"}', "run_dir=/tmp/no-run"],
        {},
    ),
    "rayrl stop, dead cluster": (["-m", "rayrl.cli", "stop", "mine"], {"RAY_ADDRESS": "127.0.0.1:1"}),
    "rayrl scale, dead cluster": (["-m", "rayrl.cli", "scale", "mine"], {"RAY_ADDRESS": "127.0.0.1:1"}),
    "rayrl status, no keys": (["-m", "rayrl.cli", "status", "s3://no-such-bucket/run"], {}),
}


def measure(arguments: list[str], variables: dict[str, str], repeats: int) -> tuple[list[float], list[float], int]:
    """Wall and CPU seconds of each repeat, and the exit code."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true"} | variables
    walls: list[float] = []
    cpus: list[float] = []
    code = 0
    for _ in range(repeats):
        before, started = os.times(), time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
        walls.append(time.perf_counter() - started)
        after = os.times()
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
        code = done.returncode
    return walls, cpus, code


def main() -> None:
    """Measure all commands, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| command | exit code | wall, s: median | longest | CPU, s |\n|---|---|---|---|---|")
    for name, (arguments, variables) in COMMANDS.items():
        walls, cpus, code = measure(arguments, variables, repeats)
        wall, longest, cpu = statistics.median(walls), max(walls), statistics.median(cpus)
        print(f"| {name} | {code} | {wall:.2f} | {longest:.2f} | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()
