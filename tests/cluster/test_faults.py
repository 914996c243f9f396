"""Faults that a run survives, stage by stage, on a real cluster of several nodes. The engines are simulated, all else
is real.

Each run begins as a copy of the undisturbed one that has come as far as the stage in question, and its tables at the
end are compared with that one's.
"""

import json
import os
import shutil
import time

import pytest

from jobs.rehearsal import PROXY_DPO
from rayrl.fleets.local_faults import FAULTS, Damage, LocalRun, cut_off, damage, hang
from tests.cluster import disturbed
from tests.cluster.disturbed import needs_hosts, survive

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
STAGES = ("sft", "generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate")
COMMAND = [*PROXY_DPO, "sft.enabled=true", "sft.batch_size=64", "sft.checkpoint_every=3", "sft.max_failures=20"]
UNHARMED = Damage(num_lost=0, num_doubled=0, num_paid_twice=0, num_different=0, num_in_flight=0)
AN_HOUR_AHEAD = """
import time

time.time, time.time_ns = (lambda now=time.time: now() + 3600), (lambda now=time.time_ns: now() + 3600 * 10**9)
"""
"""Python reads it when it starts, as sitecustomize.py: what all of a node's Python takes for the time."""


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    return disturbed.undisturbed(cluster, tmp_path_factory.mktemp("runs") / "undisturbed", COMMAND)


def begin_at(stage, cluster, undisturbed, folder, *settings):
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
    return LocalRun(cluster=cluster, folder=folder, command=[*COMMAND, *settings])


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
    run = begin_at(stage, cluster, undisturbed, tmp_path / f"{stage}-{name}".replace(" ", "-"))
    survive(run, stage, FAULTS[name])
    harm = damage(run.folder, undisturbed)
    # A question that the oracle was being asked when its caller died is spent and has no answer: nothing else is lost.
    assert harm == Damage(**UNHARMED.__dict__ | {"num_in_flight": harm.num_in_flight})
    assert harm.num_in_flight <= (2 if stage == "query" and name in ("oracle", "driver") else 0)


def test_a_replica_that_hangs_is_replaced(cluster, undisturbed, tmp_path):
    run = begin_at("generate", cluster, undisturbed, tmp_path / "hangs")
    survive(run, "generate", hang("Generator"))
    assert damage(run.folder, undisturbed) == UNHARMED


def test_all_workers_are_lost_and_others_join_late(cluster, undisturbed, tmp_path):
    def all_nodes(run, draw):
        for node in list(cluster.workers):
            cluster.kill(node)
        time.sleep(10)
        for _ in range(2):
            cluster.add()
        return True

    run = begin_at("generate", cluster, undisturbed, tmp_path / "all-nodes")
    survive(run, "generate", all_nodes)
    assert damage(run.folder, undisturbed) == UNHARMED


def test_a_preempted_node_is_left_before_it_ends(cluster, undisturbed, tmp_path):
    """As a cloud does it: a warning with a deadline, then the end."""

    def preempt(run, draw):
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

    run = begin_at("dpo", cluster, undisturbed, tmp_path / "preempted")
    survive(run, "dpo", preempt)
    assert damage(run.folder, undisturbed) == UNHARMED


@needs_hosts
@pytest.mark.parametrize("stage", ["generate", "dpo"])
def test_a_node_that_is_cut_off_works_on_and_does_no_harm(cluster, undisturbed, tmp_path, stage):
    """Given up by the others, it still writes to the files that all of them share, and so does who took its place."""
    run = begin_at(stage, cluster, undisturbed, tmp_path / f"{stage}-cut-off")
    survive(run, stage, cut_off)
    assert damage(run.folder, undisturbed) == UNHARMED


@pytest.mark.parametrize("name", ["generation replica", "node", "driver"])
def test_nodes_whose_clocks_are_an_hour_ahead_of_the_drivers_do_no_harm(cluster, undisturbed, tmp_path, name):
    """Nobody's lease ends early, nobody's lasts for ever."""

    def fault(run, draw):
        replicas = cluster.actors("Generator")
        assert replicas and all(str(tmp_path) in replica.environ()["PYTHONPATH"] for replica in replicas)
        return FAULTS[name](run, draw)

    (tmp_path / "sitecustomize.py").write_text(AN_HOUR_AHEAD)
    replace_workers(cluster, PYTHONPATH=f"{tmp_path}{os.pathsep}{cluster.environment['PYTHONPATH']}")
    try:
        folder = tmp_path / f"skewed-{name}".replace(" ", "-")
        not_on_the_head = "generators.cpus_per_replica=0.1"
        run = begin_at("generate", cluster, undisturbed, folder, not_on_the_head)
        survive(run, "generate", fault)
        assert damage(run.folder, undisturbed) == UNHARMED
    finally:
        replace_workers(cluster)


def replace_workers(cluster, **environment):
    """Others, with this in their environment."""
    before = list(cluster.workers)
    for _ in before:
        cluster.add(**environment)
    for node in before:
        cluster.kill(node)


def test_the_trainings_end_where_the_undisturbed_ones_do(cluster, undisturbed, tmp_path):
    """A worker killed in mid-DPO: the steps after its last checkpoint are taken again, with the same rows."""
    run = begin_at("dpo", cluster, undisturbed, tmp_path / "same-curve")
    survive(run, "dpo", FAULTS["training worker"])
    ours, theirs = (
        json.loads((folder / "stages" / "dpo" / "manifest.json").read_text())["metrics"]
        for folder in (run.folder, undisturbed)
    )
    assert ours["num_steps"] == theirs["num_steps"]
    assert ours["final_loss"] == pytest.approx(theirs["final_loss"], abs=1e-3)
