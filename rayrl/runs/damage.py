"""Damage to a finished stage: its files as they were when it finished, compared with those that are there.

A manifest lists every file of its stage with size, time of change and digest. A start compares sizes and times, and
reads only what has been changed since; `rayrl verify` reads everything. Files of a remote store have the store's own
mark instead of a digest, and nothing of them is read.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rayrl.runs import storage
from rayrl.runs.content import mark
from rayrl.runs.machine_cache import file_digest, read_digest


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was when its stage finished."""

    size: int
    """Bytes."""
    digest: str
    """Of its bytes; of a remote file the store's mark, empty if it has none."""
    mtime_ns: int | None = None
    """When it was changed; None of a remote file."""


Files = dict[str, dict[str, Any]]
"""`FileRecord`s as JSON, by the path in the stage's folder."""


def record_files(url: str, is_kept: Callable[[str], bool]) -> Files:
    """Record the files of a folder and below. Local ones are read, at about 1 GB/s while they are still in memory.

    Args:
        url: the folder.
        is_kept: tells by its path in the folder whether a file counts.
    """
    return {name: asdict(record) for name, record in _found(url, is_kept, file_digest).items()}


def damage(url: str, files: Files, *, thorough: bool = False) -> dict[str, str]:
    """Compare the files of a finished stage with those recorded.

    Args:
        url: the stage's folder.
        files: the manifest's.
        thorough: read every local file; otherwise only those changed since they were recorded.

    Returns:
        What is wrong, by the path in the folder; files that are not recorded are no damage.
    """
    if not files:
        return {}
    known = {name: FileRecord(**record) for name, record in files.items()}

    def digest(path: str) -> str:
        return read_digest(path) if thorough else file_digest(path)

    found = _found(url, known.__contains__, digest, {} if thorough else known)
    wrong: dict[str, str] = {}
    for name, record in known.items():
        now = found.get(name)
        if now is None:
            wrong[name] = "is missing"
        elif now.size != record.size:
            wrong[name] = f"has {now.size:,} bytes instead of {record.size:,}"
        elif _same_kind(now, record) and now.digest != record.digest:
            wrong[name] = "has other content"
    return wrong


def _same_kind(now: FileRecord, record: FileRecord) -> bool:
    """Return whether digests can be compared: a run that was moved to or from a remote store has others."""
    return (now.mtime_ns is None) == (record.mtime_ns is None) and bool(now.digest and record.digest)


def _found(
    url: str,
    is_kept: Callable[[str], bool],
    digest: Callable[[str], str],
    known: Mapping[str, FileRecord] | None = None,
) -> dict[str, FileRecord]:
    """Look at the files of a folder; of one known with this size and time, the digest is taken to be the known one."""
    known = known or {}
    folder = Path(storage.local_folder(url)) if storage.is_local(url) else None
    found: dict[str, FileRecord] = {}
    for name, info in storage.listing(url).items():
        if not is_kept(name):
            continue
        if folder is None:
            found[name] = FileRecord(size=info["size"], digest=mark(info))
            continue
        place = str(folder / name)
        status = os.stat(place)
        record = FileRecord(size=status.st_size, digest="", mtime_ns=status.st_mtime_ns)
        before = known.get(name)
        if before is not None and replace(before, digest="") == record:
            found[name] = before
        elif before is not None and before.size != record.size:
            found[name] = record  # damaged, whatever is in it
        else:
            found[name] = replace(record, digest=digest(place))
    return found
