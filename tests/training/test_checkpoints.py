"""Checkpoints of a fit that count, found from the folders alone; no Ray."""

import json

import pytest

from rayrl.runs import storage
from rayrl.training import checkpoints
from tests.s3_server import new_bucket, s3_server


@pytest.fixture(params=["path", "s3"])
def fit_url(request, tmp_path):
    if request.param == "path":
        yield f"{tmp_path}/fit"
        return
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"{new_bucket()}/stages/dpo/fit"


def write(fit_url, tmp_path, step, *, name=None, ranks=(0, 1), world_size=2):
    """A checkpoint as two ranks upload it, each from a folder of its own; its name."""
    name = name or f"checkpoint_{step:08d}_x"
    for rank in ranks:
        folder = tmp_path / f"{name}-{rank}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / f"part-{rank}.pt").write_bytes(bytes([step, rank]) * 1000)
        checkpoints.seal(str(folder), step, rank, world_size)
        for file in folder.rglob("*"):
            if file.is_file():
                storage.write_bytes(storage.join(fit_url, name, str(file.relative_to(folder))), file.read_bytes())
    return name


def list_them(fit_url, *names):
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    storage.write_json(storage.join(fit_url, checkpoints.SNAPSHOT), {"checkpoint_results": results})


def test_nothing_is_no_checkpoint(fit_url):
    checkpoints.tidy(fit_url)
    assert checkpoints.whole(fit_url) == []


def test_the_newest_is_the_one_of_the_last_step_whatever_the_clocks_said(fit_url, tmp_path):
    write(fit_url, tmp_path, 20, name="checkpoint_2020-01-01")
    write(fit_url, tmp_path, 10, name="checkpoint_2035-01-01")
    assert checkpoints.whole(fit_url) == ["checkpoint_2020-01-01", "checkpoint_2035-01-01"]


def test_a_checkpoint_without_a_ranks_part_or_cut_off_is_none(fit_url, tmp_path):
    good = write(fit_url, tmp_path, 1)
    write(fit_url, tmp_path, 2, ranks=(0,))
    cut = write(fit_url, tmp_path, 3)
    storage.write_bytes(storage.join(fit_url, cut, "state", "part-1.pt"), b"short")
    assert checkpoints.whole(fit_url) == [good]


def test_tidying_makes_room_and_keeps_what_ray_train_has_listed(fit_url, tmp_path, caplog):
    names = [write(fit_url, tmp_path, step) for step in (1, 2, 3, 4)]
    cut = write(fit_url, tmp_path, 5, ranks=(0,))
    listed_and_cut = write(fit_url, tmp_path, 6, ranks=(0,))
    list_them(fit_url, names[0], listed_and_cut)
    checkpoints.tidy(fit_url)
    there = storage.children(fit_url)
    assert names[1] not in there and cut not in there
    assert {names[0], names[2], names[3], listed_and_cut} <= set(there)
    assert checkpoints.whole(fit_url)[:2] == [names[3], names[2]]
    checkpoints.remove_damaged(fit_url)
    assert f"{listed_and_cut} is damaged" in caplog.text
    caplog.clear()
    checkpoints.tidy(fit_url)
    assert storage.children(fit_url) == [names[2], names[3]], "the two newest, and nothing that Ray Train would miss"
    checkpoints.remove_damaged(fit_url)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("damage", ["empty", "names what is gone"])
def test_a_damaged_list_is_removed_and_the_folders_stay(fit_url, tmp_path, damage, caplog):
    names = [write(fit_url, tmp_path, step) for step in (1, 2)]
    list_them(fit_url, *names, "checkpoint_gone")
    if damage == "empty":
        storage.write_bytes(storage.join(fit_url, checkpoints.SNAPSHOT), b"")
    checkpoints.tidy(fit_url)
    assert storage.children(fit_url) == names
    assert "list of checkpoints is damaged" in caplog.text


def test_a_changed_byte_is_found_by_one_rank_however_many_there_are(tmp_path):
    name = write(str(tmp_path), tmp_path / "parts", 7)
    file = tmp_path / name / "state" / "part-1.pt"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    assert checkpoints.whole(str(tmp_path)) == [name], "its sizes are right"
    for world_size in (1, 2, 3):
        found = [checkpoints.changed_files(str(tmp_path / name), rank, world_size) for rank in range(world_size)]
        assert [files for files in found if files] == [["state/part-1.pt"]]


def test_an_unreadable_list_of_a_rank_is_no_checkpoint(fit_url, tmp_path):
    name = write(fit_url, tmp_path, 1)
    url = storage.join(fit_url, name, "rank-1-of-2.json")
    storage.write_bytes(url, json.dumps(storage.read_json(url)).encode()[:-5])
    assert checkpoints.whole(fit_url) == []
