"""Guard of a process: a small process beside it that ends what it leaves behind, however it dies.

A process that is killed cannot clean up. Its children may not notice: vLLM's core waits for a parent that is gone, and
folders in shared memory outlive everything. The guard notes every descendant of the process while it lives. Once it is
dead, descendants have a moment to end by themselves; then the guard kills those that are left, removes the process's
folders in shared memory, and ends. It ends no other process: each is known by its number and the time of its start.

This file is also the guard's program. It imports the standard library only, so that a guard takes little memory.
"""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rayrl-"
POLL_S = 0.5
"""Time between two looks at the process."""
GRACE_S = 2.0
"""Time in which descendants may end by themselves."""
FOLDERS_S = 5.0
"""Time for which folders that a process has left are removed again: workers of a cluster that goes on may still write,
until Ray ends them."""


@cache
def guard_this_process() -> int:
    """Start this process's guard, once; return its number."""
    # A session of its own: neither Ctrl-C in the terminal nor the end of the process's group reaches it.
    program = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    started = subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    started.returncode = 0  # it outlives this process, so that nothing ever waits for it
    return started.pid


@contextmanager
def ending_descendants(grace_s: float = GRACE_S) -> Generator[None]:
    """Wait, after the context, for the processes that descend from this one to end, and kill those that do not.

    Within it their parents may end, such as the cluster that this process has started. Its guard stays.
    """
    known: dict[int, str] = {}
    own_guard = guard_this_process()
    _note_descendants([os.getpid()], known)
    try:
        yield
    finally:
        known.pop(own_guard, None)
        _end_descendants(known, grace_s)


def shared_memory_folder(name: str) -> Path:
    """Locate a folder in shared memory that this process's guard removes when the process has ended."""
    return SHARED_MEMORY / f"{_folder_prefix(os.getpid(), _started(os.getpid()))}{name}"


def _folder_prefix(pid: int, started: str) -> str:
    # With the time of the start: a later process may get the same number.
    return f"{PREFIX}{pid}-{started}-"


def _status(pid: int) -> list[str]:
    """Read the state of a process and what follows it in its line of status; empty if there is none."""
    try:
        # The name before it, in brackets, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; "" if it is dead, a zombie included."""
    status = _status(pid)
    return "" if not status or status[0] in "ZX" else status[19]


def _children(pid: int) -> list[int]:
    """List the children of a process."""
    found: list[int] = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            found += map(int, Path(path).read_text().split())
    return found


def _note_descendants(roots: list[int], known: dict[int, str]) -> None:
    """Add all descendants of these processes to those known, each with its start."""
    unseen = list(roots)
    while unseen:
        for child in _children(unseen.pop()):
            if child != os.getpid():
                known[child] = _started(child)
                unseen.append(child)


def _left(known: dict[int, str]) -> list[int]:
    return [pid for pid, started in known.items() if started and _started(pid) == started]


def _end_descendants(known: dict[int, str], grace_s: float) -> None:
    """Give descendants a moment to end, and kill those that do not."""
    deadline = time.monotonic() + grace_s
    while (left := _left(known)) and time.monotonic() < deadline:
        # A process whose parent is dead still tells its own children.
        _note_descendants(left, known)
        time.sleep(0.1)
    while left := _left(known):
        _note_descendants(left, known)
        for pid in _left(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def main(pid: int) -> None:
    """Guard a process until it is dead and nothing of it is left."""
    started = _started(pid)
    folders = f"{SHARED_MEMORY}/{_folder_prefix(pid, started)}*"
    known: dict[int, str] = {}
    while started and _started(pid) == started:
        known = {child: known[child] for child in _left(known)}
        _note_descendants([pid], known)
        time.sleep(POLL_S)
    left_folders = bool(glob.glob(folders))
    _end_descendants(known, GRACE_S)
    deadline = time.monotonic() + (FOLDERS_S if left_folders else 0.0)
    while True:
        for folder in glob.glob(folders):
            shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
