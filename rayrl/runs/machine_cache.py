"""Folders fetched once per machine, whichever of its processes asks for them."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrl.errors import StageTimeout

NUM_CACHED = 4
"""Folders beside each other that a machine keeps: those last used. PPO sends one after every update."""
FETCH_S = 3600.0
"""For how long a process waits for another one that fetches."""


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
        if _used(folder):  # another process fetched it meanwhile
            return
        unfinished = Path(f"{folder.parent}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            fetch(str(unfinished))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _used(folder)  # a large file is written for long after its folder
        for old in sorted(folder.parent.iterdir(), key=lambda one: one.stat().st_mtime)[:-NUM_CACHED]:
            shutil.rmtree(old, ignore_errors=True)


def _used(folder: Path) -> bool:
    """Note that a folder was used just now; whether it is there."""
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
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
                        f"waited {FETCH_S:.0f} s for another process of this machine, which holds {lock.name}"
                    ) from None
                time.sleep(0.2)
        yield
