"""Ctrl-C and SIGTERM: the first one ends a run within seconds, whatever it does, and leaves nothing behind."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from jobs.rehearsal import PROXY_DPO
from rayrl.pipelines.stopping import MESSAGE

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, threading, time
from rayrl.pipelines import stopping
from rayrl.pipelines.command_line import main
stopping.END_S = 2.0
{body}

def say(word):  # two threads print: each line is one write
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()

def first():
    time.sleep(0.3)  # the main thread is at its end by then
    say("first")

with stopping.stoppable() as run:
    with run.first(first):
        try:
            say("ready")
            work()
        except BaseException as error:
            say(type(error).__name__)
            end()
            sys.exit(run.exit_code)
"""


def signalled(body, *signals):
    """Output and exit code of a script to which signals are sent one after another."""
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        return process.stdout.read(), process.wait(timeout=60)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 130)], ids=str
)
def test_the_first_signal_stops(number, code):
    output, exit_code = signalled("work = lambda: time.sleep(600)\nend = lambda: None", number)
    assert exit_code == code and sorted(output.split()) == ["Stopped", "first"]


def test_further_signals_change_nothing():
    body = "work = lambda: time.sleep(600)\ndef end():\n    time.sleep(1)\n    print('cleaned')"
    output, exit_code = signalled(body, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    assert exit_code == 143 and sorted(output.split()) == ["Stopped", "cleaned", "first"]


def test_a_process_that_does_not_come_to_its_end_ends_hard():
    body = "work = lambda: time.sleep(600)\nend = lambda: time.sleep(600)"
    output, exit_code = signalled(body, signal.SIGINT)
    assert exit_code == 130 and MESSAGE in output


def environment():
    # Without an address a run starts a cluster of its own, in whose processes nothing else is.
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}


def stopped(command, folder, number, is_time):
    """Send a signal to a run when it is time; return its exit code, and what it said. Nothing of it may be left."""
    with (folder / "log").open("w") as log:
        job = subprocess.Popen([*command, f"run_dir={folder}/run"], cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        process, seen, deadline = psutil.Process(job.pid), set(), time.monotonic() + 240
        while not is_time():
            assert job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            seen.update(process.children(recursive=True))
            time.sleep(0.1)
        seen.update(process.children(recursive=True))
        job.send_signal(number)
        code = job.wait(timeout=60)
    finally:
        job.kill()
        job.wait()
    deadline = time.monotonic() + 60
    while left := [each for each in seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return code, (folder / "log").read_text()


def num_attempts(folder):
    with closing(sqlite3.connect(f"file:{folder}/run/ledger.sqlite?mode=ro", uri=True)) as db:
        return db.execute("SELECT count(*) FROM attempts WHERE purpose = 'label'").fetchone()[0]


def test_a_run_is_stopped_while_it_asks_and_during_a_fit_and_goes_on(tmp_path):
    """With simulated engines, which start at once; cluster, oracle, trainings and signals are real."""
    command = [*PROXY_DPO, "name=stopped", "pool.limit=40", "pool.num_eval=8", "select.budget=24"]
    command += ["oracle.max_concurrency=1", "evaluator.epochs=40", "evaluator.checkpoint_every=2"]
    run = tmp_path / "run"

    def is_asking():
        return (run / "ledger.sqlite").exists() and num_attempts(tmp_path) >= 3

    code, said = stopped(command, tmp_path, signal.SIGINT, is_asking)
    assert code == 130 and said.count(MESSAGE) == 1 and "Traceback" not in said
    num_asked = num_attempts(tmp_path)
    assert num_asked < 24 and not (run / "stages" / "query" / "manifest.json").exists()

    def is_training():
        curve = run / "metrics" / "fit_evaluator.jsonl"
        return curve.exists() and curve.stat().st_size > 0

    code, said = stopped(command, tmp_path, signal.SIGTERM, is_training)
    assert code == 143 and said.count(MESSAGE) == 1 and "SIGTERM received" not in said
    manifest = json.loads((run / "stages" / "query" / "manifest.json").read_text())
    assert manifest["metrics"]["ledger"]["label"]["spent"] == 24
    assert not (run / "stages" / "fit_evaluator" / "manifest.json").exists()
