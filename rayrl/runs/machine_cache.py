"""Caches of a machine: remote folders, each fetched once, and digests of local files, each read once."""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayrl.errors import StageTimeout
from rayrl.records import content_id

logger = logging.getLogger(__name__)

NUM_CACHED = 4
"""Folders that a machine keeps beside each other: those used last. PPO publishes one after every update."""
LARGE_BYTES = 4_000_000_000
"""Size from which reading a file is worth a word: it takes about a second per GB."""
SETTLED_NS = 2_000_000_000
"""Age from which a file's time of change tells it from a later one; filesystems count in steps of up to 2 s."""
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


def file_digest(path: str) -> str:
    """Return the digest of a local file's bytes; a file that is as it was is not read again.

    A file is as it was if its place, size, inode and time of change to the nanosecond are: what another process
    writes into it changes the time. Damage by the disk itself does not show here, and `rayrl verify` reads all bytes.
    """
    before = os.stat(path)
    name = content_id(os.path.realpath(path), *map(str, (before.st_size, before.st_mtime_ns, before.st_ino)))
    note = _notes() / name
    with suppress(OSError):
        return note.read_text()
    if before.st_size >= LARGE_BYTES:
        logger.info("reading %s (%.0f GB) once, to know it by its content", path, before.st_size / 1e9)
    digest = read_digest(path)
    after = os.stat(path)
    # A file that has just been written may be written again within the resolution of its time.
    is_settled = time.time_ns() - after.st_mtime_ns > SETTLED_NS
    if is_settled and (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
        with suppress(OSError):  # a home that cannot be written costs time, and nothing else
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished = note.with_name(f"{name}.{os.getpid()}")
            unfinished.write_text(digest)
            unfinished.replace(note)
    return digest


def read_digest(path: str) -> str:
    """Read a local file, and return the digest of its bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _notes() -> Path:
    """Locate the folder of known digests: this user's own, since whoever writes there decides what is noticed."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "rayrl" / "digests"
