"""What can happen to a run on a cluster, and whether its tables show it afterwards.

A fault is made from outside, by the operating system: SIGKILL, or SIGSTOP for what hangs. A run survives if it ends,
the same command given again if its driver was killed, with no row lost or doubled and no answer paid for twice.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.raylets import Raylets, end, until

REPLACED_AFTER_S = 3.0
"""A node that is lost is replaced by a new one, which joins late."""
GIVEN_UP_WITHIN_S = 120.0
"""A node that the cluster does not hear from."""
ENDS_WITHIN_S = 120.0
"""A raylet that is told on its return that it was given up."""
SIMULATED = [sys.executable, "-m", "jobs.bench.simulated_job", "jobs/configs/quickstart.toml"]
SHORT = [
    "pool.limit=216", "pool.num_eval=16", "generate.k=2", "generate.block_size=8", "generate.max_tokens=16",
    "generators.num_replicas=2", "generators.max_num_seqs=8", "generators.engine_args={request_s=0.2}",
    "embedders.num_replicas=2", "embedders.engine_args={request_s=0.02}", "select.budget=40", "select.num_shards=2",
    "sft.enabled=false", "oracle.function=jobs.bench.simulated_job:judge", "oracle.max_concurrency=2",
    "evaluator.type=scalar", "evaluator.epochs=6", "evaluator.checkpoint_every=15", "evaluator.max_failures=20",
    "dpo.epochs=2", "dpo.checkpoint_every=4", "dpo.max_failures=20", "evaluate.budget=32",
]  # fmt: skip
"""Of the quickstart: under 90 seconds with simulated engines."""

PPO = [sys.executable, "-m", "jobs.bench.simulated_job", "jobs/configs/rlp_quickstart.toml"]
PPO_SHORT = [
    "pool.limit=120", "pool.num_eval=16", "sft.enabled=false", "generate.max_tokens=16", "generators.num_replicas=2",
    "generators.engine_args={request_s=0.1}", "ppo.reward=function", "ppo.function=jobs.bench.simulated_job:reward",
    "ppo.rollout_size=16", "ppo.batch_size=8", "ppo.max_rollouts=12", "ppo.checkpoint_every=2", "ppo.evaluate_every=4",
    "ppo.max_failures=20", "ppo.max_kl=1000000", "evaluate.budget=64", "evaluate.best_of_n=0",
]  # fmt: skip
"""PPO alone, on a Python function. What simulated replicas say follows from the seeds, and not from the weights."""

REAL = [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml"]
REAL_SHORT = [
    "pool.limit=60", "pool.num_eval=12", "generate.k=2", "generate.block_size=8", "generate.max_tokens=24",
    "sft.enabled=false", "select.budget=24", "oracle.max_concurrency=2", "evaluator.epochs=2",
    "evaluator.checkpoint_every=2", "evaluator.max_failures=20", "dpo.epochs=1", "dpo.max_failures=20",
    "evaluate.budget=24",
]  # fmt: skip
"""The same with vLLM's, on two cores."""


@dataclass(kw_only=True)
class Drive:
    """A run that goes on: its cluster, its folder, and the driver, who is started again if he was killed."""

    cluster: Raylets
    folder: Path
    command: list[str]
    driver: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.command = [*self.command, f"run_dir={self.folder}", f"name={self.folder.name}"]
        self.start()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self) -> None:
        """The same command."""
        self.driver = self.cluster.run(self.command, self.log)

    def is_over(self) -> bool:
        return self.driver.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """Its exit code; a driver that takes longer is killed."""
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end(self.driver)
            return -signal.SIGKILL


Fault = Callable[[Drive, random.Random], bool]
"""Makes a fault if what it is to happen to is there; whether it was."""


def kill(actor: str) -> Fault:
    """SIGKILL of one actor of this class."""
    return _signal(actor, signal.SIGKILL)


def hang(actor: str) -> Fault:
    """SIGSTOP: it does not end, and does not answer."""
    return _signal(actor, signal.SIGSTOP)


def _signal(actor: str, number: signal.Signals) -> Fault:
    def fault(drive: Drive, draw: random.Random) -> bool:
        found = drive.cluster.actors(actor)
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                draw.choice(found).send_signal(number)
                return True
        return False

    return fault


def lose_node(drive: Drive, draw: random.Random) -> bool:
    """A worker node dies, and a new one joins later."""
    drive.cluster.kill(draw.choice(drive.cluster.workers))
    time.sleep(REPLACED_AFTER_S)
    drive.cluster.add()
    return True


def cut_off(drive: Drive, draw: random.Random) -> bool:
    """A worker node on a host of its own works on unheard until it is given up; it returns, and a new one joins."""
    node = draw.choice(drive.cluster.workers)
    host = drive.cluster.host(node)
    host.cut()
    until(lambda: drive.cluster.is_given_up(node), GIVEN_UP_WITHIN_S, "the cluster to give up a node that is cut off")
    host.mend()
    node.wait(ENDS_WITHIN_S)
    drive.cluster.kill(node)
    drive.cluster.add()
    return True


def kill_driver(drive: Drive, draw: random.Random) -> bool:
    """Kill -9, then the same command at once."""
    if drive.is_over():
        return False
    os.kill(drive.driver.pid, signal.SIGKILL)
    drive.driver.wait()
    drive.start()
    return True


FAULTS: dict[str, Fault] = {
    "generation replica": kill("Generator"),
    "embedding replica": kill("Embedder"),
    "coreset shard": kill("BlockShard"),
    "oracle": kill("OraclePool"),
    "router": kill("Router"),
    "training worker": kill("RayTrainWorker"),
    "training controller": kill("TrainController"),
    "node": lose_node,
    "driver": kill_driver,
}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What a finished run has that another one of the same config, undisturbed, has not, and the other way around."""

    num_lost: int
    num_doubled: int
    num_paid_twice: int
    num_different: int
    """Rows that both have, and that say different things."""
    num_in_flight: int
    """Calls to the expert that were under way when the one who asked died: counted as spent, and never repeated."""


ROWS = {"generate": "prompt_id", "select": "response_id", "query": "response_id"}
"""Tables that must be the same, and what names a row of each."""


def damage(folder: Path, undisturbed: Path) -> Damage:
    """Compare the tables and the ledger of two runs."""
    ledger = attempts(folder)
    in_flight = sum(state == "lost" for _, state in ledger)
    lost, doubled, different = 0, 0, 0
    for stage, name in ROWS.items():
        ours = [row for row in rows(folder, stage) if row.get("status") != "abstained"]
        found, theirs = {row[name]: row for row in ours}, rows(undisturbed, stage)
        doubled += len(ours) - len(found)
        missing = sum(row[name] not in found for row in theirs)
        lost += max(0, missing - in_flight) if stage == "query" else missing
        different += sum(found[row[name]] != row for row in theirs if row[name] in found)
    prompts, scored, pairs = (
        [row["prompt_id"] for row in table]
        for table in (rows(folder, "generate"), rows(folder, "pseudo_label", "scored-*"), rows(folder, "pseudo_label"))
    )
    paid = Counter(key for key, state in ledger if state == "scored")
    return Damage(
        num_lost=lost + len(set(prompts) - set(scored)),
        num_doubled=doubled + sum(len(ids) - len(set(ids)) for ids in (scored, pairs)),
        num_paid_twice=sum(count - 1 for count in paid.values()),
        num_different=different,
        num_in_flight=in_flight,
    )


def rows(folder: Path, stage: str, table: str = "table") -> list[dict]:
    """All rows of a stage's table."""
    parts = sorted((folder / "stages" / stage).glob(f"{table}/part-*.parquet"))
    return pa.concat_tables(map(pq.read_table, parts)).to_pylist() if parts else []


def attempts(folder: Path) -> list[tuple[str, str]]:
    """What was asked of the expert: (key, state)."""
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as ledger:
        return ledger.execute("SELECT key, state FROM attempts").fetchall()
