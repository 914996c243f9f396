"""Files on local and remote filesystems."""

import os
import uuid
from pathlib import Path

import fsspec
import pytest

from rayrl.runs import storage


@pytest.fixture(params=["", "file://", "memory://"])
def base(request, tmp_path):
    """A fresh folder: a path, a file URL, and a remote filesystem's URL."""
    return f"{request.param}{tmp_path}" if request.param != "memory://" else f"memory://{uuid.uuid4().hex}"


def fill(url):
    storage.write_json(storage.join(url, "config.json"), {"a": 1})
    storage.write_bytes(storage.join(url, "deep", "weights.bin"), b"weights")


def content(url):
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(path).lstrip("/"): fs.cat_file(name) for name in fs.find(path)}


def test_json_round_trip(base):
    url = storage.join(base, "new", "folder", "a.json")
    assert not storage.exists(url)
    storage.write_json(url, {"b": [1, None], "a": "x"})
    storage.write_json(url, {"b": [2, None], "a": "x"})
    assert storage.exists(url)
    assert storage.read_json(url) == {"b": [2, None], "a": "x"}
    assert len(content(storage.join(base, "new"))) == 1


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_copy_folder(base, tmp_path, scheme):
    source = storage.join(base, "source")
    target = f"{tmp_path}/target" if not scheme else f"memory://{uuid.uuid4().hex}/target"
    fill(source)
    storage.copy_folder(source, target, last="config.json")
    assert content(target) == content(source)
    storage.write_bytes(storage.join(target, "stale.bin"), b"old")
    storage.copy_folder(source, target, last="config.json")
    assert content(target) == content(source)


def test_copies_on_one_disk_are_links_that_do_not_share_later_writes(tmp_path):
    source, target = f"{tmp_path}/source", f"{tmp_path}/target"
    fill(source)
    storage.copy_folder(source, target, last="config.json")
    assert os.stat(f"{source}/config.json").st_ino == os.stat(f"{target}/config.json").st_ino
    storage.write_json(f"{target}/config.json", {"a": 2})
    assert storage.read_json(f"{source}/config.json") == {"a": 1}


def test_publish_replaces_the_folder_whole(base, tmp_path):
    url = storage.join(base, "stages", "checkpoint")
    storage.write_bytes(storage.join(url, "stale.bin"), b"old")
    fill(f"{tmp_path}/finished")
    with storage.new_folder(url) as folder:
        fill(folder)
        assert storage.exists(storage.join(url, "stale.bin")), "the old one stays until the new one is whole"
    assert content(url) == content(f"{tmp_path}/finished")


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(base):
    url = storage.join(base, "stages", "checkpoint")
    storage.write_bytes(storage.join(url, "old.bin"), b"old")
    with pytest.raises(OSError, match="disk full"), storage.new_folder(url):
        raise OSError("disk full")
    assert content(url) == {"old.bin": b"old"}


def test_local_folder_reads_what_is_there_now(base):
    url = storage.join(base, "checkpoint")
    fill(url)
    first = Path(storage.local_folder(url))
    assert (first / "deep" / "weights.bin").read_bytes() == b"weights"
    assert storage.local_folder(url) == str(first)
    storage.write_bytes(storage.join(url, "deep", "weights.bin"), b"retrained")
    assert (Path(storage.local_folder(url)) / "deep" / "weights.bin").read_bytes() == b"retrained"


def test_a_hub_id_stays_as_it_is():
    assert storage.local_folder("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute(f"file://{tmp_path}/a/") == f"{tmp_path}/a"
    assert storage.absolute("memory://runs/a/") == "memory://runs/a"
    assert storage.is_local("runs/a")
    assert not storage.is_local("memory://runs/a")
