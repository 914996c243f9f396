"""Inputs are known by content: an edited file is other work, for the run, for `reuse`, and for a half-done stage."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from rayrl.config import RunConfig
from rayrl.runs.content import Input, changed_inputs, content_of, files_content, inputs_of
from rayrl.runs.machine_cache import file_digest
from rayrl.runs.run import open_run
from rayrl.runs.stage_table import POOL, PREFERENCES, SFT
from rayrl.stages.labelling.query import oracle_key
from rayrl.stages.policy.sft import base_policy
from tests.runs.test_run import finish

KEYS = {
    "pool.path": lambda run: run.key(POOL, run.config.pool),
    "seed_data.path": lambda run: run.key(SFT, run.config.seed_data),
    "preferences.data.path": lambda run: run.key(PREFERENCES, run.config.preferences),
    "evaluate.reference_answers.path": lambda run: run.key(PREFERENCES, run.config.evaluate),
    "oracle.path": oracle_key,
    "policy.path": lambda run: base_policy(run).version,
}
"""A key that depends on an input, by the input's setting."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def inputs(tmp_path):
    """One file or folder for every kind of input."""
    folder = tmp_path / "inputs"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    for name in ("pool", "seed", "pairs", "references", "table"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    return folder


def config_of(folder, run_dir, **changes):
    tree = {
        "name": "t",
        "run_dir": str(run_dir),
        "pipeline": "rlp",
        "policy": {"path": f"{folder}/model"},
        "pool": {"path": f"{folder}/pool.jsonl"},
        "seed_data": {"path": f"{folder}/seed.jsonl"},
        "preferences": {"data": {"path": f"{folder}/pairs.jsonl"}},
        "evaluate": {"reference_answers": {"path": f"{folder}/references.jsonl"}},
        "select": {"budget": 8},
        "oracle": {"type": "replay", "path": f"{folder}/table.jsonl"},
    }
    return RunConfig.model_validate(tree | changes)


def test_every_file_that_a_config_names_is_an_input(inputs, tmp_path):
    named = {each.setting for each in inputs_of(config_of(inputs, tmp_path / "run"))}
    assert named >= KEYS.keys()


@pytest.mark.parametrize("setting", KEYS)
def test_an_edited_input_is_other_work_and_is_said(inputs, tmp_path, setting, caplog):
    config = config_of(inputs, tmp_path / "run")
    first = open_run(config)
    before = {name: key(first) for name, key in KEYS.items()}
    assert {name: key(open_run(config)) for name, key in KEYS.items()} == before and not caplog.records
    place = Path(next(each.place for each in inputs_of(config) if each.setting == setting))
    path = place / "model.safetensors" if place.is_dir() else place
    content = bytearray(path.read_bytes())
    content[3] ^= 1  # of the same size
    path.write_bytes(content)
    run = open_run(config)
    assert {name for name, key in KEYS.items() if key(run) != before[name]} == {setting}
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and f"{setting} {place} has changed since the last start" in said[0]


def test_four_zeroed_kilobytes_of_weights_are_noticed(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run")
    before = base_policy(open_run(config)).version
    with open(inputs / "model" / "model.safetensors", "r+b") as weights:
        weights.seek(4096)
        weights.write(bytes(4096))
    assert base_policy(open_run(config)).version != before


def test_weights_that_nothing_reads_do_not_count(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run")
    before = base_policy(open_run(config)).version
    (inputs / "model" / "pytorch_model.bin").write_bytes(b"old")
    (inputs / "model" / ".git").mkdir()
    (inputs / "model" / ".git" / "HEAD").write_text("ref")
    assert base_policy(open_run(config)).version == before


def test_a_half_done_stage_of_edited_data_begins_anew(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run")
    run = open_run(config)
    assert run.finished(SFT, run.key(SFT, run.config.seed_data)) is None
    half_done = tmp_path / "run" / "stages" / "sft" / "fit" / "checkpoint"
    half_done.parent.mkdir(parents=True)
    half_done.write_text("of the old data")
    run = open_run(config)
    assert run.finished(SFT, run.key(SFT, run.config.seed_data)) is None and half_done.exists()
    (inputs / "seed.jsonl").write_text('{"prompt": "a", "response": "mended"}\n')
    run = open_run(config)
    assert run.finished(SFT, run.key(SFT, run.config.seed_data)) is None and not half_done.exists()


def test_reuse_takes_nothing_of_another_content(inputs, tmp_path):
    earlier = open_run(config_of(inputs, tmp_path / "earlier"))
    finish(earlier, POOL, earlier.key(POOL, earlier.config.pool))
    again = open_run(config_of(inputs, tmp_path / "again", reuse=str(tmp_path / "earlier")))
    assert again.finished(POOL, again.key(POOL, again.config.pool)) is not None
    (inputs / "pool.jsonl").write_text('{"prompt": "mended"}\n')
    edited = open_run(config_of(inputs, tmp_path / "edited", reuse=str(tmp_path / "earlier")))
    assert edited.finished(POOL, edited.key(POOL, edited.config.pool)) is None


def test_an_edited_function_of_the_user_is_other_content(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_judge.py").write_text("def judge(prompt, response):\n    return 3\n")
    function = Input(setting="oracle.function", place="my_judge:judge", kind="function")
    before = content_of(function)
    import my_judge  # noqa: F401  # the preflight imports it

    assert before is not None and content_of(function) == before
    (tmp_path / "my_judge.py").write_text("def judge(prompt, response):\n    return 4\n")
    assert content_of(function) != before
    del sys.modules["my_judge"]


def test_a_folder_of_shards_and_a_pattern_count_every_file(tmp_path):
    for number in range(3):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / f"{number}.jsonl").write_text(str(number))
    for place in (f"{tmp_path}/shards", f"{tmp_path}/shards/*.jsonl"):
        before = files_content(place)
        (tmp_path / "shards" / "1.jsonl").write_text("mended")
        assert files_content(place) != before
        (tmp_path / "shards" / "1.jsonl").write_text("1")
        assert files_content(place) == before
    with pytest.raises(FileNotFoundError):
        files_content(f"{tmp_path}/none/*.jsonl")


def test_a_file_that_is_as_it_was_is_not_read_again(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    os.utime(path, ns=(0, 10**18))  # long ago: its time tells it from a later one
    digest = file_digest(str(path))
    (note,) = (tmp_path / "cache" / "rayrl" / "digests").iterdir()
    note.write_text("noted")
    assert file_digest(str(path)) == "noted"
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    assert file_digest(str(copy)) == digest  # another file


def test_what_cannot_be_found_out_is_taken_to_be_as_it_was(tmp_path):
    assert changed_inputs({"pool.path": "a", "new": ""}, {"pool.path": "a", "new": "b", "another": "c"}) == []
    assert changed_inputs({"pool.path": "a"}, {"pool.path": "b"}) == ["pool.path"]
    unknown = Input(setting="policy.path", place="no-such/model-of-the-hub", kind="model")
    assert content_of(unknown) is None
