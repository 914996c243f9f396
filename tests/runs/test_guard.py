"""A guard ends what a killed process leaves: children at any depth, also in sessions of their own, and its folders."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rayrl.runs import guard

LEAVING = """
import subprocess, sys, time
from rayrl.runs.guard import guard_this_process, shared_memory_folder
print(guard_this_process(), flush=True)
grandchild = "import subprocess, sys, time; " \\
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); time.sleep(600)"
time.sleep({before_s})
subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
folder = shared_memory_folder("test")
folder.mkdir()
(folder / "weights").write_text("x")
print(folder, flush=True)
time.sleep(600)
"""


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def leaving():
    process = subprocess.Popen([sys.executable, "-c", LEAVING.format(before_s=1.0)], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_leaves_nothing(leaving):
    own_guard = psutil.Process(int(leaving.stdout.readline()))
    folder = Path(leaving.stdout.readline().strip())
    process = psutil.Process(leaving.pid)
    until(lambda: len(process.children(recursive=True)) == 3)  # the guard, a child and its child
    family = process.children(recursive=True)
    leaving.kill()
    leaving.wait()
    until(lambda: not folder.exists() and not any(map(is_alive, family)))
    assert own_guard in family


def test_a_guard_leaves_strangers_alone(leaving):
    leaving.stdout.readline()
    folder = Path(leaving.stdout.readline().strip())
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other = Path(f"{folder}x".replace(f"rayrl-{leaving.pid}-", "rayrl-1-"))
    other.mkdir()
    try:
        leaving.kill()
        leaving.wait()
        until(lambda: not folder.exists())
        assert stranger.poll() is None and other.exists()
    finally:
        stranger.kill()
        stranger.wait()
        other.rmdir()


def test_a_process_has_one_guard():
    first = guard.guard_this_process()
    assert guard.guard_this_process() == first
    psutil.Process(first).kill()
    guard.guard_this_process.cache_clear()
