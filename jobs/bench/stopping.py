"""Stop of a run in each of its stages: seconds to its end, exit code, questions asked after it, what is left behind.

    python -m jobs.bench.stopping proxy_dpo SIGINT          # five minutes
    python -m jobs.bench.stopping rlp SIGTERM
    python -m jobs.bench.stopping proxy_dpo SIGKILL --stages query --continued
    python -m jobs.bench.stopping proxy_dpo SIGKILL --engines real --stages engines generate fit_evaluator

One run is stopped again and again: at its start, and in the midst of every stage that takes long enough for it; before
its first training, during trainings, and after them. The same command continues it. "after it" are attempts in the
ledger that the signal found unmade. "left" are processes of the run and folders in shared memory: a second after the
end of a stopped run, and a minute after the end of a killed one. Simulated engines start at once; trainings, oracle,
cluster and signals are real.
"""

import argparse
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs import rehearsal
from jobs.bench.hardware import hardware

WAIT_S = 400.0
LEFT_S = {"SIGINT": 1.0, "SIGTERM": 1.0, "SIGKILL": 60.0}
"""Time after the end until what is left is counted, by signal. The guard looks twice a second."""
SETTINGS = {
    "proxy_dpo": ["sft.enabled=true", "seed_data.limit=200", "sft.checkpoint_every=4", "evaluate.budget=64"],
    "rlp": [
        "pool.limit=120", "pool.num_eval=16", "seed_data.limit=200", "generate.max_tokens=16", "select.budget=40",
        "ppo.rollout_size=16", "ppo.batch_size=8", "ppo.max_rollouts=6", "ppo.max_kl=1000000", "ppo.evaluate_every=4",
        "evaluate.budget=64", "evaluate.best_of_n=0", "oracle.max_concurrency=2",
        "oracle.function=jobs.rehearsal:judge", "oracle.compare_function=jobs.rehearsal:compare",
    ],
}  # fmt: skip
SIMULATED = {
    "proxy_dpo": rehearsal.PROXY_DPO,
    "rlp": [
        sys.executable, "-m", "jobs.rehearsal", "jobs/configs/rlp_quickstart.toml",
        "generators.engine_args={request_s=0.1}", "embedders.engine_args={request_s=0.02}",
    ],
}  # fmt: skip
REAL = {
    "proxy_dpo": [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", *rehearsal.PROXY_DPO[4:8]],
    "rlp": [sys.executable, "jobs/rlp.py", "jobs/configs/rlp_quickstart.toml"],
}
TURNED_DOWN = [
    "generators.num_replicas=1", "embedders.num_replicas=1", "generators.max_num_seqs=4",
    "evaluator.micro_batch_tokens=512",
    "dpo.micro_batch_tokens=512",
    "oracle.max_concurrency=1", "oracle.requests_per_minute=300",
]  # fmt: skip
"""Settings as after a lack of memory, and another rate limit."""
STAGES = {
    "proxy_dpo": ["start", "pool", "sft", "generate", "select", "query", "fit_evaluator", "dpo", "evaluate"],
    "rlp": [
        *("start", "sft", "generate", "preferences", "fit_reward_model", "ppo", "samples", "synthesize"),
        *("refit_reward_model", "ppo_refreshed", "track_rewards", "evaluate"),
    ],
}
ASKING = {"query", "preferences"}
TRAININGS = {"sft", "fit_evaluator", "dpo", "fit_reward_model", "refit_reward_model", "ppo", "ppo_refreshed"}


@dataclass
class Row:
    """What one signal did."""

    stage: str
    seconds: float | None = None
    exit_code: int | None = None
    num_after: int = 0
    num_processes: int = 0
    num_folders: int = 0

    def line(self) -> str:
        """Write the row of the table."""
        if self.seconds is None:
            return f"| {self.stage} | ended before the signal | | | | |"
        return (
            f"| {self.stage} | {self.seconds:.1f} | {self.exit_code} | {self.num_after} | {self.num_processes} | "
            f"{self.num_folders} |"
        )


def shared_memory() -> set[str]:
    """Name the folders of runs in shared memory."""
    return {str(path) for path in Path("/dev/shm").glob("rayrl-*")}


def num_attempts(folder: Path, stage: str | None = None) -> int:
    """Count the questions in the run's ledger, or those of a stage."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{folder}/ledger.sqlite?mode=ro", uri=True)) as db,
    ):
        return db.execute("SELECT count(*) FROM attempts WHERE stage = ? OR ? IS NULL", (stage, stage)).fetchone()[0]
    return 0


def under_way(folder: Path, stage: str) -> Callable[[], bool]:
    """Return what tells whether a stage is under way; a training is once its curve has begun."""
    place = folder / "stages" / stage
    if stage in ("start", "engines"):
        return lambda: (folder / "timings.json").exists()
    if stage in ASKING:
        return lambda: num_attempts(folder, stage) >= 5
    if stage in TRAININGS:
        curves = [folder / "metrics" / f"{stage}.jsonl", folder / "metrics" / f"{stage}-0.jsonl"]
        return lambda: any(curve.exists() and curve.stat().st_size > 0 for curve in curves)
    return lambda: (place / "work.json").exists() and any(path.name != "work.json" for path in place.iterdir())


def has_starting_engine(family: set[psutil.Process]) -> bool:
    """Tell whether vLLM's core has just been spawned in one of these processes, and has not named itself yet."""
    for process in family:
        with contextlib.suppress(psutil.Error):
            if any("spawn_main" in part for part in process.cmdline()):
                return True
    return False


def stop(command: list[str], folder: Path, stage: str, number: str) -> Row:
    """Start or continue the run, send it a signal in the midst of a stage, and see what is left of it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    folders_before = shared_memory()
    began = time.monotonic()
    with open(f"{folder}.log", "a") as log:
        job = subprocess.Popen([*command, f"run_dir={folder}"], env=environment, stdout=log, stderr=log)
    process, family = psutil.Process(job.pid), set[psutil.Process]()
    is_time, manifest = under_way(folder, stage), folder / "stages" / stage / "manifest.json"
    while not (is_time() and (stage != "engines" or has_starting_engine(family))):
        if manifest.exists() or job.poll() is not None or time.monotonic() - began > WAIT_S:
            break
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update(process.children(recursive=True))
        time.sleep(0.05)
    is_late = manifest.exists() or job.poll() is not None
    if job.poll():
        said = Path(f"{folder}.log").read_text().splitlines()[-10:]
        sys.exit(
            "\n".join([f"the run ended by itself with exit code {job.poll()}, before the signal; it said:", *said])
        )
    with contextlib.suppress(psutil.NoSuchProcess):
        family.update(process.children(recursive=True))
    sent = time.monotonic()
    job.send_signal(getattr(signal, "SIGINT" if is_late else number))
    num_asked = num_attempts(folder)
    exit_code = job.wait(WAIT_S)
    seconds = time.monotonic() - sent
    time.sleep(LEFT_S[number])
    left = [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    if is_late:
        return Row(stage)
    return Row(
        stage=stage,
        seconds=seconds,
        exit_code=exit_code,
        num_after=num_attempts(folder) - num_asked,
        num_processes=len(left),
        num_folders=len(shared_memory() - folders_before),
    )


def go_on(command: list[str], folder: Path) -> str:
    """Continue a run to its end with settings turned down, and return what its ledger then holds."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(f"{folder}.log", "a") as log:
        done = subprocess.run([*command, f"run_dir={folder}", *TURNED_DOWN], env=environment, stdout=log, stderr=log)
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
        states = dict(db.execute("SELECT state, count(*) FROM attempts GROUP BY state"))
        num_questions = db.execute("SELECT count(DISTINCT key) FROM attempts").fetchone()[0]
    return f"exit code {done.returncode}; {num_questions} questions, attempts by state: {states}"


def main() -> None:
    """Print the table of one pipeline and one signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=sorted(STAGES))
    parser.add_argument("signal", choices=["SIGINT", "SIGTERM", "SIGKILL"])
    parser.add_argument("--stages", nargs="*")
    parser.add_argument("--engines", choices=["simulated", "real"], default="simulated")
    parser.add_argument("--continued", action="store_true", help="to the end, with settings turned down")
    parser.add_argument("--folder", help="of a run that is continued; None makes a new one")
    arguments = parser.parse_args()
    engines = SIMULATED if arguments.engines == "simulated" else REAL
    command = [*engines[arguments.pipeline], *SETTINGS[arguments.pipeline], "name=stopped"]
    print(hardware())
    print(f"{arguments.pipeline}, {arguments.signal}, {arguments.engines} engines\n")
    print("| stage | seconds | exit code | asked after it | processes left | folders left |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="rayrl-stopping-", ignore_cleanup_errors=True) as scratch:
        folder = Path(arguments.folder or f"{scratch}/run")
        for stage in arguments.stages or STAGES[arguments.pipeline]:
            print(stop(command, folder, stage, arguments.signal).line(), flush=True)
        if arguments.continued:
            print(f"\ncontinued with {' '.join(TURNED_DOWN)}: {go_on(command, folder)}")


if __name__ == "__main__":
    main()
