"""Damage to a finished run is noticed at the next start or by `rayrl verify`, named, and repaired without paying."""

import os

import pytest
from typer.testing import CliRunner

from rayrl.cli import app
from rayrl.runs import storage
from rayrl.runs.damage import damage, record_files
from rayrl.runs.run import open_run
from rayrl.runs.stage_table import DPO, GENERATE, QUERY
from tests.runs.test_run import config_of, finish

PART, OTHER = "table/part-00000.parquet", "table/part-00001.parquet"


def finished_run(folder, stage=GENERATE, files=(PART, OTHER)):
    run = open_run(config_of(folder))
    assert run.finished(stage, "k1") is None
    for name in files:
        storage.write_bytes(run.folder(stage, name), b"rows " * 2000)
    finish(run, stage, "k1")
    return run


def lose(path):
    os.remove(path)


def cut(path):
    os.truncate(path, 100)


def zero(path):
    with open(path, "r+b") as file:
        file.write(bytes(4096))


@pytest.mark.parametrize(
    ("harm", "said"), [(lose, "is missing"), (cut, "has 100 bytes instead of 10,000"), (zero, "has other content")]
)
def test_damage_is_noticed_at_the_next_start_and_only_the_damaged_part_is_made_again(tmp_path, harm, said, caplog):
    run = finished_run(tmp_path)
    assert open_run(config_of(tmp_path)).finished(GENERATE, "k1") is not None
    harm(run.folder(GENERATE, PART))
    assert open_run(config_of(tmp_path)).finished(GENERATE, "k1") is None
    assert f"generate: finished, but damaged since, and made again: {PART} {said}" in caplog.text
    assert not storage.exists(run.folder(GENERATE, PART)) and storage.exists(run.folder(GENERATE, OTHER))


@pytest.mark.parametrize("harm", [lose, zero])
@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/config.json"])
def test_a_damaged_model_is_trained_again_with_a_new_curve(tmp_path, harm, name):
    files = ("checkpoint/config.json", "checkpoint/model.safetensors", "table/part-00000.parquet")
    run = finished_run(tmp_path, DPO, files)
    storage.write_bytes(run.curve(DPO), b'{"step": 1}')
    harm(run.folder(DPO, name))
    assert open_run(config_of(tmp_path)).finished(DPO, "k1") is None
    left = storage.sizes(run.folder(DPO))
    assert set(left) == {"work.json", "table/part-00000.parquet"} and not storage.exists(run.curve(DPO))


def test_a_damaged_stage_is_not_taken_over(tmp_path, caplog):
    earlier = finished_run(tmp_path / "earlier")
    lose(earlier.folder(GENERATE, PART))
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    assert run.finished(GENERATE, "k1") is None
    assert "is damaged" in caplog.text and "is not taken over" in caplog.text
    assert storage.exists(earlier.folder(GENERATE, "manifest.json"))  # another's run is left as it is


def test_a_run_that_was_moved_is_whole(tmp_path):
    finished_run(tmp_path / "run")
    for folder, _, names in os.walk(tmp_path / "run"):
        for name in names:
            os.utime(os.path.join(folder, name), ns=(5, 5))  # as a copy without times leaves it
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert open_run(config_of(tmp_path / "moved")).finished(GENERATE, "k1") is not None


def test_damage_by_the_disk_itself_shows_when_all_bytes_are_read(tmp_path):
    path = tmp_path / "folder" / "weights"
    path.parent.mkdir()
    path.write_bytes(b"a" * 10_000)
    files = record_files(str(path.parent), lambda name: True)
    status = path.stat()
    zero(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # nobody wrote it
    assert damage(str(path.parent), files) == {}
    assert damage(str(path.parent), files, thorough=True) == {"weights": "has other content"}


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_verify_names_what_is_damaged_and_repairs_it(tmp_path):
    run = finished_run(tmp_path)
    finished_run(tmp_path, QUERY, files=(PART,))
    whole = verify(tmp_path)
    assert whole.exit_code == 0 and "3 files of 2 finished stages are as they were written" in whole.output
    lose(run.folder(QUERY, PART))
    found = verify(tmp_path)
    assert found.exit_code == 1 and f"query/{PART} is missing" in found.output
    assert "made again from the answers in the ledger, which are not paid again" in found.output
    assert storage.exists(run.folder(QUERY, "manifest.json"))  # looked at, and left
    assert verify(tmp_path, "--repair").exit_code == 1
    assert not storage.exists(run.folder(QUERY, "manifest.json"))
    assert storage.exists(run.folder(GENERATE, "manifest.json"))
    assert verify(tmp_path).exit_code == 0


def test_verify_names_a_damaged_manifest(tmp_path):
    run = finished_run(tmp_path)
    storage.write_bytes(run.folder(GENERATE, "manifest.json"), b"{half")
    found = verify(tmp_path)
    assert found.exit_code == 1 and "manifest.json cannot be read" in found.output
