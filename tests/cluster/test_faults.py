"""What a run survives, stage by stage, on a real cluster of several nodes; the engines are simulated, all else is real.

Each run begins as a copy of the undisturbed one that has come as far as the stage in question, and its tables at the
end are compared with that one's.
"""

import json
import random
import shutil
import time

import pytest

from jobs.bench.faults import FAULTS, SHORT, SIMULATED, Damage, Drive, attempts, damage, hang
from jobs.bench.raylets import Raylets, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
RUN_S = 600.0
STAGES = ("sft", "generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate")
SETTINGS = [*SHORT, "sft.enabled=true", "sft.batch_size=64", "sft.checkpoint_every=3", "sft.max_failures=20"]
UNHARMED = Damage(num_lost=0, num_doubled=0, num_paid_twice=0, num_different=0, num_in_flight=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Raylets(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    drive = Drive(
        cluster=cluster, folder=tmp_path_factory.mktemp("runs") / "undisturbed", command=[*SIMULATED, *SETTINGS]
    )
    assert drive.wait(RUN_S) == 0, drive.log.read_text()[-4000:]
    return drive.folder


def begin_at(stage, cluster, undisturbed, folder):
    """A run for which `stage` is the next."""
    done = STAGES[: STAGES.index(stage)]
    for name in ("pool", *done):
        shutil.copytree(undisturbed / "stages" / name, folder / "stages" / name)
    (folder / "metrics").mkdir()
    for name in done:
        if (undisturbed / "metrics" / f"{name}.jsonl").exists():
            shutil.copy(undisturbed / "metrics" / f"{name}.jsonl", folder / "metrics")
    if "query" in done:
        shutil.copy(undisturbed / "ledger.sqlite", folder)
    return Drive(cluster=cluster, folder=folder, command=[*SIMULATED, *SETTINGS])


def is_under_way(stage, folder):
    """Whether a stage has done some of its work, and has more to do."""
    at = folder / "stages" / stage
    if (at / "manifest.json").exists():
        raise AssertionError(f"{stage} was over before anything could happen to it")
    if stage in ("sft", "fit_evaluator", "dpo"):
        curve = folder / "metrics" / f"{stage}.jsonl"
        return curve.exists() and len(curve.read_text().splitlines()) >= 2
    if stage == "query":
        return (folder / "ledger.sqlite").exists() and sum(state == "scored" for _, state in attempts(folder)) >= 5
    return len(list(at.glob("*/part-*.parquet"))) >= 3


def survive(drive, stage, fault):
    """Make a fault in the midst of a stage, and wait for the end."""
    try:
        until(lambda: is_under_way(stage, drive.folder) or drive.is_over(), RUN_S, f"{stage} to be under way")
        until(lambda: fault(drive, random.Random(0)), 30, "something to happen")
        assert drive.wait(RUN_S) == 0, drive.log.read_text()[-4000:]
    finally:
        drive.driver.kill()


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "training worker"),
        ("sft", "node"),
        ("sft", "driver"),
        ("generate", "generation replica"),
        ("generate", "router"),
        ("generate", "node"),
        ("generate", "driver"),
        ("select", "embedding replica"),
        ("select", "coreset shard"),
        ("select", "node"),
        ("select", "driver"),
        ("query", "oracle"),
        ("query", "node"),
        ("query", "driver"),
        ("fit_evaluator", "training worker"),
        ("fit_evaluator", "node"),
        ("fit_evaluator", "driver"),
        ("dpo", "training worker"),
        ("dpo", "training controller"),
        ("dpo", "embedding replica"),
        ("dpo", "node"),
        ("dpo", "driver"),
        ("evaluate", "node"),
        ("evaluate", "driver"),
    ],
)
def test_a_kill_leaves_no_trace_in_the_tables(cluster, undisturbed, tmp_path, stage, name):
    drive = begin_at(stage, cluster, undisturbed, tmp_path / f"{stage}-{name}".replace(" ", "-"))
    survive(drive, stage, FAULTS[name])
    harm = damage(drive.folder, undisturbed)
    # What the expert was being asked when the one who asked died is spent, and its answer missing: nothing else is.
    assert harm == Damage(**UNHARMED.__dict__ | {"num_in_flight": harm.num_in_flight})
    assert harm.num_in_flight <= (2 if stage == "query" and name in ("oracle", "driver") else 0)


def test_a_replica_that_hangs_is_replaced(cluster, undisturbed, tmp_path):
    drive = begin_at("generate", cluster, undisturbed, tmp_path / "hangs")
    survive(drive, "generate", hang("Generator"))
    assert damage(drive.folder, undisturbed) == UNHARMED


def test_all_workers_are_lost_and_others_join_late(cluster, undisturbed, tmp_path):
    def all_nodes(drive, draw):
        for node in list(cluster.workers):
            cluster.kill(node)
        time.sleep(10)
        for _ in range(2):
            cluster.add()
        return True

    drive = begin_at("generate", cluster, undisturbed, tmp_path / "all-nodes")
    survive(drive, "generate", all_nodes)
    assert damage(drive.folder, undisturbed) == UNHARMED


def test_a_preempted_node_is_left_before_it_ends(cluster, undisturbed, tmp_path):
    """As a cloud does it: a warning with a deadline, then the end."""

    def preempt(drive, draw):
        node = cluster.workers[0]
        said, code = cluster.ray(
            *("drain-node", f"--address={cluster.address}", f"--node-id={cluster.node_id(node)}"),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "8"),
        )
        assert code == 0, said
        time.sleep(8)
        cluster.kill(node)
        cluster.add()
        return True

    drive = begin_at("dpo", cluster, undisturbed, tmp_path / "preempted")
    survive(drive, "dpo", preempt)
    assert damage(drive.folder, undisturbed) == UNHARMED


def test_the_trainings_end_where_the_undisturbed_ones_do(cluster, undisturbed, tmp_path):
    """A worker killed in mid-DPO: the steps after its last checkpoint are taken again, with the same rows."""
    drive = begin_at("dpo", cluster, undisturbed, tmp_path / "same-curve")
    survive(drive, "dpo", FAULTS["training worker"])
    ours, theirs = (
        json.loads((folder / "stages" / "dpo" / "manifest.json").read_text())["metrics"]
        for folder in (drive.folder, undisturbed)
    )
    assert ours["num_steps"] == theirs["num_steps"]
    assert ours["final_loss"] == pytest.approx(theirs["final_loss"], abs=1e-3)
