"""The command `rayrl study`: its exit codes and messages, and a study that is killed and goes on."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.study.made_up import write_pool, write_study

SLOW_ORACLE = """[oracle]
type = "scripted"
function = "tests.study.oracle:slow_judge"
max_concurrency = 4
"""


@pytest.fixture
def folder(tmp_path):
    write_pool(tmp_path)
    return tmp_path


def command(path, *overrides):
    return [sys.executable, "-m", "rayrl.cli", "study", str(path), *overrides]


def run(path, *overrides):
    return subprocess.run(command(path, *overrides), capture_output=True, text=True, timeout=240)


def counted(folder):
    """Calls of the oracle, as it counted them itself, and attempts in the ledger by state."""
    calls = (folder / "calls.txt").read_text().splitlines()
    with sqlite3.connect(folder / "study" / "ledger.sqlite") as ledger:
        return calls, dict(ledger.execute("select state, count(*) from attempts group by state").fetchall())


def test_a_mistake_is_one_message_and_exit_code_2(folder):
    done = run(write_study(folder), "baseline=nothing")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "baseline: must be one of" in done.stderr.replace("baseline must", "baseline: must")


def test_the_plan_starts_nothing(folder):
    done = run(write_study(folder), "--plan")
    assert done.returncode == 0, done.stderr
    assert "at most 160 label queries by all cells together" in done.stdout and "cells: 14, 14 of them" in done.stdout
    assert not (folder / "study").exists()


def test_a_killed_study_goes_on_and_repeats_no_paid_question(folder, monkeypatch):
    monkeypatch.setenv("STUDY_CALLS", str(folder / "calls.txt"))
    (folder / "calls.txt").touch()
    path = write_study(folder, oracle=SLOW_ORACLE)
    driver = subprocess.Popen(command(path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len((folder / "calls.txt").read_text().splitlines()) < 60:
        assert driver.poll() is None and time.monotonic() < deadline, "the study asks nothing"
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()

    done = run(path)
    assert done.returncode == 0, done.stderr[-3000:]
    calls, states = counted(folder)
    num_lost = states.get("lost", 0)
    # Each response is paid for once; those in flight at the kill may be asked again, and are counted.
    assert len(set(calls)) == 160 and states["scored"] == 160
    assert len(calls) - 160 <= num_lost <= 4
    assert (folder / "study" / "results.parquet").exists() and (folder / "study" / "study.html").exists()

    again = run(path)
    assert again.returncode == 0 and len(counted(folder)[0]) == len(calls)


def test_a_failed_cell_is_told_with_exit_code_1(folder):
    path = write_study(folder, study="")
    done = run(path, "budgets=[10]", "resources.timeout_s=0.01", "seeds=[0,1]")
    assert done.returncode == 1
    assert "10 of 10 cells failed; the same command tries them again" in done.stdout
    assert "it took longer than resources.timeout_s, 0.01 s" in done.stdout
    assert json.dumps(done.stdout).count("failed:") == 10
