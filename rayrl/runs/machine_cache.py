"""Cache of remote folders on a machine: each is fetched once, whichever of the machine's processes needs it."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rayrl.errors import StageTimeout

NUM_CACHED = 4
"""Folders that a machine keeps beside each other: those used last. PPO publishes one after every update."""
FETCH_S = 3600.0
"""Longest wait for another process that fetches."""


def fetch_once(folder: Path, fetch: Callable[[str], object]) -> None:
    """Make a folder unless it is there, whole or not at all, and remove those beside it that were used longest ago.

    Args:
        folder: one of several in a folder of nothing else.
        fetch: makes a folder that is not there.

    Raises:
        StageTimeout: another process of this machine holds the lock for too long.
    """
    if _used(folder):
        return
    with _alone(folder.parent):
        # Another process may have fetched it while this one waited for the lock.
        if _used(folder):
            return
        unfinished = Path(f"{folder.parent}.unfinished")
        # A process that was killed may have left it.
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            fetch(str(unfinished))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        # A large file is written for long after its folder was made, so the folder's time is set again.
        _used(folder)
        oldest_first = sorted(folder.parent.iterdir(), key=lambda cached: cached.stat().st_mtime)
        for old in oldest_first[:-NUM_CACHED]:
            shutil.rmtree(old, ignore_errors=True)


def _used(folder: Path) -> bool:
    """Note that a folder was used just now; False if it does not exist."""
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Hold a folder's lock, which the system releases when this process ends, however it does."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + FETCH_S
    with open(f"{folder}.lock", "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StageTimeout(
                        f"waited {FETCH_S:.0f} s for another process of this machine, which holds {lock.name}; "
                        "run again, and end that process if it fetches nothing"
                    ) from None
                time.sleep(0.2)
        yield
