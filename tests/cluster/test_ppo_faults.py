"""Faults that PPO survives on a cluster of several nodes: the rollouts, the rewards and the policy are those of an
undisturbed one. The engines are simulated, all else is real.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from jobs.rehearsal import PPO
from rayrl.fleets.local_faults import FAULTS, LocalRun, cut_off, hang
from tests.cluster import disturbed
from tests.cluster.disturbed import needs_hosts, survive

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
KNOWN = ("reward", "num_responses", "length", "truncated", "num_abstained")
"""Of a rollout: what the replicas and the reward say, which nothing may change."""

START = Path(__file__).parents[2] / "jobs/quickstart/model"
SAME = 1e-3
"""Of the way that the policy went, which has 24 steps: one too many is 0.04 of it. What was seen is 0."""


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    return disturbed.undisturbed(cluster, tmp_path_factory.mktemp("ppo") / "undisturbed", PPO)


def rollouts(folder):
    """The last that was written of each."""
    rows = map(json.loads, (folder / "metrics" / "ppo.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows}


def held_out(folder):
    parts = sorted((folder / "stages" / "ppo" / "held_out").glob("*/part-*.parquet"))
    return {str(part.relative_to(folder)): pq.read_table(part).to_pylist() for part in parts}


def flat(checkpoint):
    """All weights, by name."""
    weights = load_file(checkpoint / "model.safetensors")
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def assert_the_same(ours, theirs):
    assert rollouts(ours).keys() == rollouts(theirs).keys()
    for step in rollouts(theirs).keys() - {0}:  # before the first there is none
        ours_of, theirs_of = rollouts(ours)[step], rollouts(theirs)[step]
        assert {name: ours_of[name] for name in KNOWN} == {name: theirs_of[name] for name in KNOWN}
    assert held_out(ours) == held_out(theirs) and held_out(ours)
    weights, expected = (flat(folder / "stages/ppo/checkpoint") for folder in (ours, theirs))
    start = flat(START)
    assert (weights - expected).norm() < SAME * (expected - start).norm()


FAULTS_OF_PPO = {name: FAULTS[name] for name in ("training worker", "training controller", "generation replica")}
FAULTS_OF_PPO |= {name: FAULTS[name] for name in ("router", "node", "driver")}


@pytest.mark.parametrize("name", FAULTS_OF_PPO)
def test_a_kill_changes_nothing(cluster, undisturbed, tmp_path, name):
    run = LocalRun(cluster=cluster, folder=tmp_path / f"ppo-{name}".replace(" ", "-"), command=PPO)
    survive(run, "ppo", FAULTS_OF_PPO[name])
    assert_the_same(run.folder, undisturbed)


def test_a_replica_that_hangs_is_replaced(cluster, undisturbed, tmp_path):
    run = LocalRun(cluster=cluster, folder=tmp_path / "ppo-hangs", command=PPO)
    survive(run, "ppo", hang("Generator"))
    assert_the_same(run.folder, undisturbed)


@needs_hosts
def test_a_trainer_that_is_cut_off_does_no_harm(cluster, undisturbed, tmp_path):
    run = LocalRun(cluster=cluster, folder=tmp_path / "ppo-cut-off", command=PPO)
    survive(run, "ppo", cut_off)
    assert_the_same(run.folder, undisturbed)
