"""Files on local and remote filesystems."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rayrl.errors import DiskFull
from rayrl.runs import storage
from rayrl.runs.machine_cache import NUM_CACHED
from tests.s3_server import new_bucket, s3_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a real S3 server of this machine."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield new_bucket()


@pytest.fixture(params=["", "file://", "memory://", "s3://"])
def base(request, tmp_path):
    """A fresh folder: a path, a file URL, and remote filesystems' URLs."""
    if request.param == "s3://":
        return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
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
    storage.copy_folder(source, target, last=["config.json"])
    assert content(target) == content(source)
    storage.write_bytes(storage.join(target, "stale.bin"), b"old")
    storage.copy_folder(source, target, last=["config.json"])
    assert content(target) == content(source)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_files_that_are_copied_last_need_not_be_there(base, tmp_path, scheme):
    source = storage.join(base, "source")
    target = f"{tmp_path}/target" if not scheme else f"memory://{uuid.uuid4().hex}/target"
    fill(source)
    storage.copy_folder(source, target, last=["nowhere.json", "config.json"])
    assert content(target) == content(source)


def test_copies_on_one_disk_are_links_that_do_not_share_later_writes(tmp_path):
    source, target = f"{tmp_path}/source", f"{tmp_path}/target"
    fill(source)
    storage.copy_folder(source, target, last=["config.json"])
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


def test_a_machine_keeps_the_few_models_it_used_last(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weights = f"{bucket}/{uuid.uuid4().hex}/weights"
    for step in range(NUM_CACHED + 2):
        storage.write_bytes(f"{weights}/{step}/model.bin", bytes(step + 1))
        folder = storage.local_folder(f"{weights}/{step}")
        os.utime(folder, (step, step))
        assert Path(folder, "model.bin").stat().st_size == step + 1
    kept = sorted(file.stat().st_size for file in tmp_path.rglob("model.bin"))
    assert kept == list(range(3, NUM_CACHED + 3))
    assert Path(storage.local_folder(f"{weights}/0"), "model.bin").stat().st_size == 1, "fetched again"


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Names of the models that were fetched into a machine's empty cache, each of which took a while."""
    names = []

    class Slow(MemoryFileSystem):
        def get(self, rpath, lpath, **options):
            names.append(rpath.rpartition("/")[2])
            super().get(rpath, lpath, **options)
            time.sleep(0.5)
            os.utime(lpath, (0, 0))  # when its last file was begun

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "locate", lambda url: (Slow(), url.removeprefix("memory:/")))
    return names


def test_a_machine_fetches_a_model_once_whoever_asks_for_it(fetched):
    url = f"memory://{uuid.uuid4().hex}"
    for name in ("a", "b"):
        fill(f"{url}/{name}")
    asked = [f"{url}/{name}" for name in "aabb" * 2]
    with ThreadPoolExecutor(len(asked)) as processes:
        folders = list(processes.map(storage.local_folder, asked))
    assert sorted(fetched) == ["a", "b"] and len(set(folders)) == 2
    assert all(Path(folder, "deep", "weights.bin").exists() for folder in folders)


def test_the_model_that_was_just_fetched_is_not_the_one_that_goes(fetched, tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    for n in range(NUM_CACHED + 1):
        fill(f"{url}/{n}")
        assert Path(storage.local_folder(f"{url}/{n}"), "config.json").exists()
    assert len(list(tmp_path.rglob("config.json"))) == NUM_CACHED
    assert not list(tmp_path.rglob("*.unfinished"))


def test_what_a_killed_process_has_fetched_in_part_is_no_model(fetched, tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    fill(f"{url}/a")
    parent = Path(storage.local_folder(f"{url}/a")).parent
    unfinished = Path(f"{parent}.unfinished")
    unfinished.mkdir()
    (unfinished / "half.bin").write_bytes(b"half")
    fill(f"{url}/b")
    assert content(storage.local_folder(f"{url}/b")).keys() == {"config.json", "deep/weights.bin"}
    assert not unfinished.exists()


def test_a_hub_id_stays_as_it_is():
    assert storage.local_folder("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute(f"file://{tmp_path}/a/") == f"{tmp_path}/a"
    assert storage.absolute("memory://runs/a/") == "memory://runs/a"
    assert storage.is_local("runs/a")
    assert not storage.is_local("memory://runs/a")


def test_files_are_listed_and_removed(base):
    assert storage.children(base) == [] and storage.sizes(base) == storage.times(base) == {}
    fill(base)
    assert storage.children(base) == ["config.json", "deep"]
    assert storage.sizes(base)["deep/weights.bin"] == 7
    assert abs(storage.times(base)["deep/weights.bin"] - time.time()) < 100
    storage.remove(storage.join(base, "config.json"))
    storage.remove(storage.join(base, "config.json"))
    assert not storage.exists(storage.join(base, "config.json"))
    storage.remove_folder(storage.join(base, "deep"))
    assert storage.children(base) == []


def test_what_another_process_writes_is_seen_at_once(bucket):
    url = f"{bucket}/{uuid.uuid4().hex}"
    fill(url)
    assert storage.children(url) == ["config.json", "deep"]
    assert not storage.exists(f"{url}/manifest.json")
    program = f"from rayrl.runs import storage; storage.write_json('{url}/manifest.json', {{}})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert storage.exists(f"{url}/manifest.json")
    assert storage.children(url) == ["config.json", "deep", "manifest.json"]


def test_endpoint_and_keys_come_from_the_aws_config_too(bucket, tmp_path):
    url = f"{bucket}/{uuid.uuid4().hex}/a.json"
    storage.write_json(url, {"a": 1})
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_CONFIG_FILE": f"{tmp_path}/config", "AWS_SHARED_CREDENTIALS_FILE": f"{tmp_path}/keys"}
    program = f"from rayrl.runs import storage; print(storage.read_json('{url}'))"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "{'a': 1}", ran.stderr[-2000:]


@pytest.mark.parametrize("place", ["path", "bucket"])
def test_a_writer_killed_before_it_publishes_leaves_the_old_file(place, tmp_path, bucket):
    """`kill -9` between writing and renaming (a disk), and before the upload (an object store)."""
    url = f"{tmp_path if place == 'path' else bucket}/{uuid.uuid4().hex}/manifest.json"
    storage.write_json(url, {"key": "old"})
    program = f"""
import os, signal
from rayrl.runs import storage
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
import s3fs
s3fs.S3FileSystem._call_s3 = kill
storage.write_json({url!r}, {{"key": "new" * 1000}})
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert storage.read_json(url) == {"key": "old"}
    storage.write_json(url, {"key": "newer"})
    assert storage.read_json(url) == {"key": "newer"}


def test_a_multipart_upload_that_ends_midway_is_never_seen(bucket):
    """Large objects go up in parts; half of them are no object."""
    url = f"{bucket}/{uuid.uuid4().hex}/weights.bin"
    fs, path = storage.locate(url)
    half = fs.open(path, "wb", block_size=5 << 20)
    half.write(b"x" * (6 << 20))
    assert not storage.exists(url)
    half.discard()
    storage.write_bytes(url, b"y" * (6 << 20))
    assert storage.sizes(url.rpartition("/")[0]) == {"weights.bin": 6 << 20}


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    """A real EFBIG of the kernel, as a quota gives; a file of 10 kB fits, one of 100 kB does not."""
    path = tmp_path / "table" / "part-00000.parquet"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        storage.write_bytes(str(path), b"a" * 10_000)
        with pytest.raises(DiskFull, match=rf"the disk of {path} must have room .* [\d,]+ bytes free"):
            storage.write_bytes(str(path), b"b" * 100_000)
        with pytest.raises(DiskFull, match="weights"), storage.new_folder(f"{tmp_path}/weights") as folder:
            Path(folder, "model.bin").write_bytes(b"c" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"a" * 10_000
    assert [p.name for p in tmp_path.rglob("*")] == ["table", path.name], "what did not fit is gone"


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), storage.refusing_full_disk(str(tmp_path)):
        raise PermissionError(errno.EACCES, "no")
    shutil.rmtree(tmp_path)
    with pytest.raises(DiskFull, match="step 4: the disk of"), storage.refusing_full_disk(f"{tmp_path}/x", "step 4"):
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3: file write failed")


def test_parts_of_two_ranks_meet_in_one_folder(tmp_path):
    for rank in range(2):
        part = tmp_path / f"part-{rank}"
        storage.write_bytes(str(part / "state" / f"rank-{rank}.pt"), b"state")
        storage.write_bytes(str(part / f"list-{rank}.json"), b"list")
        storage.move_files(str(part), str(tmp_path / "checkpoint"), last=f"list-{rank}.json")
        assert not part.exists()
    assert sorted(storage.sizes(str(tmp_path / "checkpoint"))) == [
        "list-0.json",
        "list-1.json",
        "state/rank-0.pt",
        "state/rank-1.pt",
    ]
