"""Faults of a run on a local cluster, and a check of what they left in the run's tables.

A fault is made from outside, by the operating system: SIGKILL to a process, SIGSTOP for one that hangs, a node that is
lost or cut off. A run survives if it finishes with no row lost or doubled, and no question paid for twice: `damage`
compares it with an undisturbed run of the same config. If the fault kills the driver, the same command is given again.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.fleets.local_cluster import LocalCluster, kill_process, wait_until
from rayrl.runs.stage_table import GENERATE, PSEUDO_LABEL, QUERY, SELECT, Stage

REPLACED_AFTER_S = 3.0
"""Time until a lost node is replaced by a new one."""
GIVEN_UP_WITHIN_S = 120.0
"""Longest wait until the cluster gives up a node that is cut off."""
ENDS_WITHIN_S = 120.0
"""Longest wait until a raylet ends that learns, once it is connected again, that it was given up."""


@dataclass(kw_only=True)
class LocalRun:
    """A run on a local cluster, started at once. Its driver can be killed and started again.

    The command is completed by the run's folder and name.
    """

    cluster: LocalCluster
    folder: Path
    command: list[str]
    driver: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.command = [*self.command, f"run_dir={self.folder}", f"name={self.folder.name}"]
        self.start()

    @property
    def log(self) -> Path:
        """File with the output of all its drivers."""
        return self.folder.with_suffix(".log")

    def start(self) -> None:
        """Start a driver with the same command, which continues the run."""
        self.driver = self.cluster.run(self.command, self.log)

    def is_over(self) -> bool:
        """Tell whether the driver has ended."""
        return self.driver.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """Wait for the driver's end and return its exit code; a driver that takes longer is killed."""
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill_process(self.driver)
            return -signal.SIGKILL


Fault = Callable[[LocalRun, random.Random], bool]
"""Makes a fault, and returns whether it could: its victim may not have been there."""


def kill(actor: str) -> Fault:
    """Return a fault that kills one actor of this class."""
    return _signal(actor, signal.SIGKILL)


def hang(actor: str) -> Fault:
    """Return a fault that stops one actor of this class: its process neither ends nor answers."""
    return _signal(actor, signal.SIGSTOP)


def _signal(actor: str, number: signal.Signals) -> Fault:
    def fault(run: LocalRun, draw: random.Random) -> bool:
        found = run.cluster.actors(actor)
        if found:
            # The process may have ended since it was listed: then this was no fault, and the caller tries again.
            with contextlib.suppress(psutil.NoSuchProcess):
                draw.choice(found).send_signal(number)
                return True
        return False

    return fault


def lose_node(run: LocalRun, draw: random.Random) -> bool:
    """Kill a worker node; a new one joins later."""
    run.cluster.kill(draw.choice(run.cluster.workers))
    time.sleep(REPLACED_AFTER_S)
    run.cluster.add()
    return True


def cut_off(run: LocalRun, draw: random.Random) -> bool:
    """Cut the link of a worker node, which works on until it is given up; connect it again, and add a new node."""
    node = draw.choice(run.cluster.workers)
    host = run.cluster.host(node)
    host.disconnect()
    wait_until(
        lambda: run.cluster.is_given_up(node), GIVEN_UP_WITHIN_S, "the cluster to give up a node that is cut off"
    )
    host.reconnect()
    node.wait(ENDS_WITHIN_S)
    run.cluster.kill(node)  # the raylet has ended; what it has left behind ends here
    run.cluster.add()
    return True


def kill_driver(run: LocalRun, draw: random.Random) -> bool:
    """Kill the driver, and give the same command again at once."""
    if run.is_over():
        return False
    os.kill(run.driver.pid, signal.SIGKILL)
    run.driver.wait()  # the ledger's lock is free only once this process is gone
    run.start()
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
    """Differences between a finished run and an undisturbed one of the same config."""

    num_lost: int
    num_doubled: int
    num_paid_twice: int
    num_different: int
    """Rows that both runs have, with different content."""
    num_in_flight: int
    """Calls to the oracle that were under way when their caller died: counted as spent, and never repeated."""


COMPARED = ((GENERATE, "prompt_id"), (SELECT, "response_id"), (QUERY, "response_id"))
"""Stages whose tables must be equal, each with the column that names a row."""


def damage(folder: Path, undisturbed: Path) -> Damage:
    """Compare the tables and the ledger of two runs."""
    ledger = attempts(folder)
    num_in_flight = sum(state == "lost" for _, state in ledger)
    num_lost, num_doubled, num_different = 0, 0, 0
    for stage, name in COMPARED:
        ours = [row for row in rows(folder, stage) if row.get("status") != "abstained"]
        theirs = rows(undisturbed, stage)
        found = {row[name]: row for row in ours}
        num_doubled += len(ours) - len(found)
        num_missing = sum(row[name] not in found for row in theirs)
        if stage is QUERY:
            # A question that was under way has no answer, and its row is missing for that reason.
            num_missing = max(0, num_missing - num_in_flight)
        num_lost += num_missing
        num_different += sum(found[row[name]] != row for row in theirs if row[name] in found)
    prompts = [row["prompt_id"] for row in rows(folder, GENERATE)]
    scored = [row["prompt_id"] for row in rows(folder, PSEUDO_LABEL, "scored-*")]
    pairs = [row["prompt_id"] for row in rows(folder, PSEUDO_LABEL)]
    num_lost += len(set(prompts) - set(scored))
    for ids in (scored, pairs):
        num_doubled += len(ids) - len(set(ids))
    num_answers = Counter(key for key, state in ledger if state == "scored")
    return Damage(
        num_lost=num_lost,
        num_doubled=num_doubled,
        num_paid_twice=sum(count - 1 for count in num_answers.values()),
        num_different=num_different,
        num_in_flight=num_in_flight,
    )


def rows(folder: Path, stage: Stage, table: str = "table") -> list[dict[str, Any]]:
    """Read all rows of a stage's table; `table` may be a pattern."""
    parts = sorted((folder / "stages" / stage.name).glob(f"{table}/part-*.parquet"))
    return pa.concat_tables(map(pq.read_table, parts)).to_pylist() if parts else []


def attempts(folder: Path) -> list[tuple[str, str]]:
    """Read (key, state) of every question that the oracle was asked."""
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as ledger:
        return ledger.execute("SELECT key, state FROM attempts").fetchall()
