"""Files on any fsspec filesystem: atomic JSON, whole folders, and local copies of remote model folders."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rayrl.records import content_id


def is_local(url: str) -> bool:
    """Whether a URL is a path of the local filesystem (NFS included)."""
    return isinstance(url_to_fs(url)[0], LocalFileSystem)


def absolute(url: str) -> str:
    """A URL every process can open: a relative local path becomes absolute, anything else stays."""
    return str(Path(url_to_fs(url)[1]).absolute()) if is_local(url) else url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """A URL inside a folder's URL."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = url_to_fs(url)
    return bool(fs.exists(path))


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file or nothing: readers never see half of it."""
    fs, path = url_to_fs(url)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    if not is_local(url):  # object stores publish an object only when it is complete
        fs.pipe_file(path, content)
        return
    unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_bytes(url: str) -> bytes:
    """Read a whole file."""
    with fsspec.open(url, "rb") as file:
        return file.read()  # type: ignore[union-attr]


def write_json(url: str, content: Any) -> None:
    """Write a whole JSON file or nothing."""
    write_bytes(url, json.dumps(content, indent=2, sort_keys=True).encode())


def read_json(url: str) -> Any:
    """Read a JSON file."""
    with fsspec.open(url, "rb") as file:
        return json.load(file)  # type: ignore[arg-type]


def copy_folder(source: str, target: str, *, last: str) -> None:
    """Replace a folder by a copy of another, its file `last` copied last; on one local disk by hard links, for free."""
    fs, path = url_to_fs(target)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    if is_local(source) and is_local(target):
        root = url_to_fs(source)[1]
        shutil.copytree(root, path, copy_function=_link, ignore=lambda folder, _: [last] if folder == root else [])
        _link(join(root, last), join(path, last))
        return
    with tempfile.TemporaryDirectory() as local:
        url_to_fs(source)[0].get(url_to_fs(source)[1], f"{local}/copy", recursive=True)
        os.rename(f"{local}/copy/{last}", f"{local}/{last}")
        fs.put(f"{local}/copy/", f"{path}/", recursive=True)
        fs.put_file(f"{local}/{last}", f"{path}/{last}")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device
        shutil.copy2(source, target)


def local_folder(url: str) -> str:
    """A local folder with the content of `url`; a remote one is fetched once per machine, and again when its files have
    changed. A hub id stays as it is.
    """
    if "://" not in url:
        return url
    if is_local(url):
        return str(url_to_fs(url)[1])
    fs, path = url_to_fs(url)
    files = fs.find(path, detail=True)  # sizes, times, tags: a run made again has other weights at the same place
    cache = Path(tempfile.gettempdir()) / "rayrl-models" / content_id(url, *(f"{n} {files[n]}" for n in sorted(files)))
    if not cache.exists():
        unfinished = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}")
        fs.get(path, str(unfinished), recursive=True)
        try:
            unfinished.rename(cache)
        except OSError:  # another process of this machine fetched it meanwhile
            shutil.rmtree(unfinished)
    return str(cache)


@contextmanager
def new_folder(url: str) -> Iterator[str]:
    """A local folder to fill, which then takes its place in the run: whole, or, if filling it fails, not at all."""
    fs, path = url_to_fs(url)
    if is_local(url):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=f"{Path(path).name}.") as unfinished:
            yield unfinished
            os.chmod(unfinished, 0o755)  # a temporary folder is its owner's alone
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
            os.mkdir(unfinished)  # for the one that removes it
        return
    with tempfile.TemporaryDirectory() as unfinished:
        yield unfinished
        remove_folder(url)
        fs.put(unfinished + "/", path + "/", recursive=True)


def remove_folder(url: str) -> None:
    """Remove a folder, if it is there."""
    fs, path = url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)
