"""File of a ledger: its lock, and its working copy where the run directory is remote."""

import fcntl
import time
from pathlib import Path
from typing import IO

from rayrl.errors import RunDirectoryError
from rayrl.runs import storage

_POLL_S = 0.1


def own(path: Path, wait_s: float) -> IO[str]:
    """Lock the ledger for this process, by an open file. The kernel drops the lock when the process dies.

    Raises:
        RunDirectoryError: another process still owns it after `wait_s`, or the filesystem has no locks.
    """
    lock = open(f"{path}.lock", "w")  # noqa: SIM115 the caller closes it, or dies
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise RunDirectoryError(
                    f"{path} must have one owner, and another process holds it; end that run, or use another run_dir"
                ) from None
            time.sleep(_POLL_S)
        except OSError as error:
            lock.close()
            raise RunDirectoryError(f"{path} must be on a filesystem with file locks: {error}") from None


def is_remote(location: str) -> bool:
    """Return whether a location is an fsspec URL rather than a path."""
    return "://" in location


def working_copy(url: str, folder: str) -> Path:
    """Copy a remote ledger to `folder`, if there is one, and return the path of the local file."""
    path = Path(folder) / "ledger.sqlite"
    if storage.exists(url):
        path.write_bytes(storage.read_bytes(url))
    return path
