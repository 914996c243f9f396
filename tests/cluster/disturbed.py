"""A run to which something happens in the midst of a stage."""

import os
import random

import pytest

from rayrl.fleets.local_cluster import wait_until
from rayrl.fleets.local_faults import Fault, LocalRun, attempts

RUN_S = 600.0
needs_hosts = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a node a network of its own")
TRAININGS = ("sft", "fit_evaluator", "dpo", "ppo")


def undisturbed(cluster, folder, command):
    """The folder of a run to which nothing happens."""
    run = LocalRun(cluster=cluster, folder=folder, command=command)
    assert run.wait(RUN_S) == 0, run.log.read_text()[-4000:]
    return run.folder


def is_under_way(stage, folder):
    """Return whether a stage has done some of its work, and has more to do."""
    at = folder / "stages" / stage
    if (at / "manifest.json").exists():
        raise AssertionError(f"{stage} was over before anything could happen to it")
    if stage in TRAININGS:
        curve = folder / "metrics" / f"{stage}.jsonl"
        return curve.exists() and len(curve.read_text().splitlines()) >= 2
    if stage == "query":
        return (folder / "ledger.sqlite").exists() and sum(state == "scored" for _, state in attempts(folder)) >= 5
    return len(list(at.glob("*/part-*.parquet"))) >= 3


def survive(run: LocalRun, stage: str, fault: Fault):
    """Make a fault in the midst of a stage, and wait for the end."""
    try:
        wait_until(lambda: is_under_way(stage, run.folder) or run.is_over(), RUN_S, f"{stage} to be under way")
        wait_until(lambda: fault(run, random.Random(0)), 30, "something to happen")
        assert run.wait(RUN_S) == 0, run.log.read_text()[-4000:]
    finally:
        run.driver.kill()
