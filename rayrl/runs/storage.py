"""Files on any fsspec filesystem: atomic JSON, whole folders, and local copies of remote model folders.

Endpoints and keys are the filesystem's own business: s3fs reads AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and its like, the
AWS config files, or the machine's role, in every process anew.
"""

# fsspec has no type stubs
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rayrl.errors import DiskFull
from rayrl.records import content_id
from rayrl.runs.machine_cache import fetch_once

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a file larger than the system allows."""
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "memory"})
"""They have no folders to make, and publish an object only when it is complete."""


class FileSystem(Protocol):
    """The part of fsspec's (untyped) AbstractFileSystem that is used here."""

    protocol: str | tuple[str, ...]

    def exists(self, path: str) -> bool: ...
    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> None: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def mv(self, path1: str, path2: str) -> None: ...
    def rm(self, path: str, recursive: bool = False) -> None: ...
    def rm_file(self, path: str) -> None: ...
    def get(self, rpath: str, lpath: str, recursive: bool = False) -> None: ...
    def put(self, lpath: str, rpath: str, recursive: bool = False) -> None: ...
    def put_file(self, lpath: str, rpath: str) -> None: ...
    def find(self, path: str, *, detail: bool) -> dict[str, dict[str, Any]]: ...
    def ls(self, path: str, detail: bool = True) -> list[str]: ...


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the filesystem of a URL and the path on it. Listings are not cached: other processes write there, too."""
    return cast(tuple[AbstractFileSystem, str], url_to_fs(url, use_listings_cache=False))


def _files(url: str) -> tuple[FileSystem, str]:
    filesystem, path = locate(url)
    return cast(FileSystem, filesystem), path


def is_local(url: str) -> bool:
    """Tell whether a URL is a path of the local filesystem (NFS included)."""
    return isinstance(locate(url)[0], LocalFileSystem)


def absolute(url: str) -> str:
    """Return a URL that every process can open: a relative local path becomes absolute, anything else stays."""
    return str(Path(locate(url)[1]).absolute()) if is_local(url) else url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """Return a URL inside a folder's URL."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, path = _files(url)
    return fs.exists(path)


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file or nothing: readers never see half of it.

    Raises:
        DiskFull: the disk has no room for it; what was there before is still there.
    """
    fs, path = _files(url)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    if not OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        fs.pipe_file(path, content)
        return
    if not is_local(url):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(temporary, content)
        fs.mv(temporary, path)
        return
    unfinished = Path(temporary)
    with refusing_full_disk(path):
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def refusing_full_disk(url: str, what: str = "") -> Generator[None]:
    """Turn a full disk, while something is written, into an error that names the disk and what is free there.

    Args:
        url: place that is written to; it need not exist.
        what: the thing that is written, for the message.

    Raises:
        DiskFull: there is no room for it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not _is_full(error):
            raise
        raise DiskFull(
            f"{what + ': ' if what else ''}the disk of {url} must have room for what is written there, and has "
            f"{_free(url)} free ({error}); free some, or put it on another disk, and run again: what was whole before "
            "is still there"
        ) from None


def _free(url: str) -> str:
    if not is_local(url):
        return "too little"
    path = Path(locate(url)[1])
    return f"{shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free:,} bytes"


def _is_full(error: Exception) -> bool:
    """Recognise a full disk. Libraries like torch write files outside of Python: they report in words, not by errno."""
    words = ("No space left on device", "File too large", "Disk quota exceeded")
    words += ("PytorchStreamWriter failed writing", "iostream error", "inline_container")
    return getattr(error, "errno", None) in FULL or any(part in str(error) for part in words)


def read_bytes(url: str) -> bytes:
    """Read a whole file."""
    fs, path = _files(url)
    return fs.cat_file(path)


def write_json(url: str, content: object) -> None:
    """Write a whole JSON file or nothing."""
    write_bytes(url, json.dumps(content, indent=2, sort_keys=True).encode())


def read_json(url: str) -> Any:
    """Read a JSON file."""
    return json.loads(read_bytes(url))


def copy_folder(source: str, target: str, *, last: Sequence[str]) -> None:
    """Replace a folder by a copy of another; on one local disk by hard links, for free.

    Args:
        source: the folder.
        target: where the copy lies in the end; what is there is removed.
        last: names of files that are copied last, in this order; those that the folder does not have are left out.
    """
    fs, path = _files(target)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    if is_local(source) and is_local(target):
        root = locate(source)[1]
        shutil.copytree(root, path, copy_function=_link, ignore=lambda folder, _: last if folder == root else [])
        for name in [name for name in last if exists(join(root, name))]:
            _link(join(root, name), join(path, name))
        return
    with tempfile.TemporaryDirectory() as local:
        theirs, folder = _files(source)
        theirs.get(folder, f"{local}/copy", recursive=True)
        there = [name for name in last if os.path.exists(f"{local}/copy/{name}")]
        for name in there:
            os.rename(f"{local}/copy/{name}", f"{local}/{name}")
        fs.put(f"{local}/copy/", f"{path}/", recursive=True)
        for name in there:
            fs.put_file(f"{local}/{name}", f"{path}/{name}")


def move_files(source: str, target: str, *, last: str) -> None:
    """Move the files of a local folder into a folder that may hold others; on one disk they are renamed, for free.

    Args:
        source: the folder, which is gone in the end.
        target: URL of the folder that they move to.
        last: name of the file that is moved last: when it is there, all are.
    """
    fs, path = _files(target)
    names = sorted(file.relative_to(source).as_posix() for file in Path(source).rglob("*") if file.is_file())
    for name in [*(name for name in names if name != last), last]:
        if is_local(target):
            place = Path(path, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(join(source, name), place)
        else:
            fs.put_file(join(source, name), join(path, name))
    shutil.rmtree(source)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another device, or a filesystem without hard links.
        shutil.copy2(source, target)


def local_folder(url: str) -> str:
    """Return a local folder with the content of `url`; a hub id is returned as it is.

    A remote folder is fetched once per machine, and again when its files have changed.

    Raises:
        DiskFull: this machine has no room for it.
        StageTimeout: another process of this machine is fetching it for too long.
    """
    if "://" not in url:
        return url
    if is_local(url):
        return str(locate(url)[1])
    fs, path = _files(url)
    # Sizes, times and tags name the cache: a run made again has other weights at the same place.
    files = fs.find(path, detail=True)
    caches = Path(tempfile.gettempdir()) / "rayrl-models" / content_id(url.rstrip("/").rpartition("/")[0])
    cache = caches / content_id(url, *(f"{name} {files[name]}" for name in sorted(files)))
    with refusing_full_disk(str(cache)):
        fetch_once(cache, lambda folder: fs.get(path, folder, recursive=True))
    return str(cache)


@contextmanager
def new_folder(url: str) -> Generator[str]:
    """Yield a local folder to fill, which then takes its place in the run: whole or, if filling it fails, not at all.

    On an object store the files follow one by one; the stage's manifest, written later, tells that all are there.

    Raises:
        DiskFull: there is no room for it.
    """
    fs, path = _files(url)
    if is_local(url):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        parent, prefix = Path(path).parent, f"{Path(path).name}."
        with refusing_full_disk(path), tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as unfinished:
            yield unfinished
            # A temporary folder can be read by its owner alone.
            os.chmod(unfinished, 0o755)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
            # TemporaryDirectory removes this one when it ends.
            os.mkdir(unfinished)
        return
    with refusing_full_disk(tempfile.gettempdir()), tempfile.TemporaryDirectory() as unfinished:
        yield unfinished
        remove_folder(url)
        fs.put(unfinished + "/", path + "/", recursive=True)


def children(url: str) -> list[str]:
    """List the names in a folder; none if it does not exist."""
    fs, path = _files(url)
    try:
        return sorted(child.rstrip("/").rpartition("/")[2] for child in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def listing(url: str) -> dict[str, dict[str, Any]]:
    """Return what the filesystem tells of every file in a folder and below, by its path in the folder."""
    fs, path = _files(url)
    root = path.strip("/")
    return {name.strip("/")[len(root) + 1 :]: file for name, file in fs.find(path, detail=True).items()}


def sizes(url: str) -> dict[str, int]:
    """Return the bytes of every file in a folder and below, by its path in the folder."""
    return {name: file["size"] for name, file in listing(url).items()}


def times(url: str) -> dict[str, float]:
    """Return when every file in a folder and below was written, as Unix time, by its path in the folder."""
    written: dict[str, float] = {}
    for inside, file in listing(url).items():
        # Local files, S3 and other stores each have a name of their own for it.
        at: object = file.get("mtime") or file.get("LastModified") or file.get("created")
        if isinstance(at, datetime):
            written[inside] = at.timestamp()
        elif isinstance(at, float | int):
            written[inside] = float(at)
    return written


def remove(url: str) -> None:
    """Remove a file, if it exists."""
    fs, path = _files(url)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_folder(url: str) -> None:
    """Remove a folder or a file, if it exists."""
    fs, path = _files(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)
