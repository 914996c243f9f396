"""The run directory: who may continue it, and which stages are finished."""

import os
import uuid

import pytest

from rayrl.config import GenerateConfig, RunConfig, SelectConfig
from rayrl.errors import RunDirectoryError
from rayrl.metrics.curves import read_metrics
from rayrl.runs import storage
from rayrl.runs.run import differences, open_run, round_name


def config_of(run_dir, **settings):
    tree = {
        "name": "test",
        "run_dir": str(run_dir),
        "policy": {"path": "model"},
        "pool": {"path": "prompts.jsonl"},
        "sft": {"enabled": False},
        "select": {"budget": 8},
        "oracle": {"type": "scripted", "function": "a:b"},
    }
    return RunConfig.model_validate(tree | settings)


@pytest.fixture(params=["", "file://", "memory://"])
def run_dir(request, tmp_path):
    return f"{request.param}{tmp_path}/run" if request.param != "memory://" else f"memory://{uuid.uuid4().hex}/run"


def finish(run, stage, key, *, num_rows=3):
    return run.finish(stage, key, since=0.0, num_rows=num_rows, metrics={"loss": 0.5}, summary="done")


def test_a_stage_is_finished_when_its_manifest_says_so(run_dir):
    run = open_run(config_of(run_dir))
    assert run.finished("generate", "k1") is None
    written = finish(run, "generate", "k1")
    again = open_run(config_of(run_dir))
    assert again.finished("generate", "k1") == written
    assert again.finished("generate", "k2") is None
    assert again.finished("select", "k1") is None
    assert again.stages() == {"generate"}


def test_timings_survive_a_restart(run_dir):
    open_run(config_of(run_dir)).record_time("engine", 1.23456, ended_at=10.0)
    run = open_run(config_of(run_dir))
    run.record_time("fit", 2.0, ended_at=13.0)
    assert open_run(config_of(run_dir)).timings == [
        {"what": "engine", "seconds": 1.235, "ended_at": 10.0},
        {"what": "fit", "seconds": 2.0, "ended_at": 13.0},
    ]


def test_another_config_is_refused_by_name(run_dir):
    open_run(config_of(run_dir))
    with pytest.raises(RunDirectoryError) as refused:
        open_run(config_of(run_dir, seed=7, generate={"k": 8}))
    message = str(refused.value)
    assert "generate.k (4 there, 8 now)" in message
    assert "seed (0 there, 7 now)" in message
    assert "select" not in message.partition("differ:")[2].partition(".")[0]
    assert "Choose another run_dir" in message


def test_where_a_run_lives_is_no_difference(tmp_path):
    open_run(config_of(tmp_path / "a"))
    os.rename(tmp_path / "a", tmp_path / "b")
    open_run(config_of(tmp_path / "b", reuse=str(tmp_path / "c")))
    nested = {"policy": {"run_dir": "x"}}
    assert differences(nested, {"policy": {"run_dir": "y"}}) == ["policy.run_dir ('x' there, 'y' now)"]
    assert differences({"new": None}, {}) == []


def test_keys_name_everything_that_decides(tmp_path):
    run = open_run(config_of(tmp_path / "a"))
    other_seed = open_run(config_of(tmp_path / "b", seed=1))
    key = run.key("generate", GenerateConfig(), "pool", 3, None)
    assert key == open_run(config_of(tmp_path / "a")).key("generate", GenerateConfig(), "pool", 3, None)
    others = [
        run.key("select", GenerateConfig(), "pool", 3, None),
        run.key("generate", GenerateConfig(k=8), "pool", 3, None),
        run.key("generate", GenerateConfig(), "other pool", 3, None),
        run.key("generate", GenerateConfig(), "pool", "3", None),
        run.key("generate", GenerateConfig(), "pool", 3),
        run.key("generate", SelectConfig(budget=1), "pool", 3, None),
        other_seed.key("generate", GenerateConfig(), "pool", 3, None),
    ]
    assert len({key, *others}) == 8


@pytest.mark.parametrize("source", ["", "memory://"])
def test_reuse_takes_over_a_finished_stage_and_its_files(run_dir, tmp_path, source):
    earlier = f"{source}{tmp_path}/earlier" if not source else f"memory://{uuid.uuid4().hex}/earlier"
    first = open_run(config_of(earlier))
    storage.write_bytes(first.folder("generate", "table", "part-00000.parquet"), b"rows")
    written = finish(first, "generate", "k1")
    run = open_run(config_of(run_dir, reuse=earlier))
    assert run.finished("generate", "k2") is None
    assert run.stages() == set()
    assert run.finished("generate", "k1") == written
    assert run.stages() == {"generate"}
    assert storage.exists(run.folder("generate", "table", "part-00000.parquet"))
    assert open_run(config_of(run_dir)).finished("generate", "k1") == written


@pytest.mark.parametrize("source", ["", "memory://"])
def test_reuse_takes_over_the_curve_of_a_training(tmp_path, source):
    earlier = f"{source}{tmp_path}/earlier" if not source else f"memory://{uuid.uuid4().hex}/earlier"
    first = open_run(config_of(earlier))
    theirs = storage.join(first.url, "metrics", "ppo.jsonl")
    storage.write_bytes(theirs, b'{"step": 1, "kl": 0.5}\n')
    finish(first, "ppo", "k1")
    run = open_run(config_of(tmp_path / "run", reuse=earlier))
    mine = storage.join(run.url, "metrics", "ppo.jsonl")
    assert run.finished("ppo", "k2") is None and not storage.exists(mine)
    run.finished("ppo", "k1")
    assert read_metrics(mine) == [{"step": 1, "kl": 0.5}]
    with open(mine, "a") as curve:  # goes on without touching the other run's
        curve.write('{"step": 2, "kl": 0.6}\n')
    assert (len(read_metrics(mine)), len(read_metrics(theirs))) == (2, 1)


def test_reuse_takes_nothing_from_a_stage_that_is_not_finished(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    storage.write_bytes(first.folder("generate", "table", "part-00000.parquet"), b"rows")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    assert run.finished("generate", "k1") is None
    assert not storage.exists(run.folder("generate"))


def test_reuse_replaces_what_another_attempt_left(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    storage.write_bytes(first.folder("generate", "table", "part-00000.parquet"), b"rows")
    written = finish(first, "generate", "k1")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    finish(run, "generate", "k0", num_rows=1)
    assert run.finished("generate", "k1") == written
    assert open_run(config_of(tmp_path / "run")).finished("generate", "k1") == written


def test_reuse_links_instead_of_copying_on_one_disk(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    part = ("generate", "table", "part-00000.parquet")
    storage.write_bytes(first.folder(*part), b"rows")
    finish(first, "generate", "k1")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    run.finished("generate", "k1")
    assert os.stat(run.folder(*part)).st_ino == os.stat(first.folder(*part)).st_ino


def test_local_model_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    run = open_run(config_of("run"))
    assert run.config.policy.path == str(tmp_path / "model")
    assert run.url == str(tmp_path / "run")
    open_run(config_of("run"))


def pay(run, num, stage="query"):
    run.finish(stage, "k", since=0.0, num_rows=num, metrics={"num_spent": num}, summary="paid")


def test_one_round_is_the_run_itself(run_dir):
    run = open_run(config_of(run_dir))
    (only,) = run.rounds()
    assert only == run
    assert only.key("select", only.config.select, "k") == run.key("select", run.config.select, "k")


def test_a_later_round_has_a_folder_a_seed_and_what_is_left(run_dir):
    run = open_run(config_of(run_dir, rounds=3, seed=4))
    rounds = run.rounds()
    first = next(rounds)
    assert (first.url, first.config.seed, first.config.select.budget) == (run.url, 4, 3)
    pay(first, 2)  # one was refunded
    second = next(rounds)
    assert second.url == f"{run.url}/rounds/2"
    assert second.folder("query", "table") == f"{run.url}/rounds/2/stages/query/table"
    assert second.config.select.budget == 3
    pay(second, 3, "preferences")
    third = next(rounds)
    assert third.config.select.budget == 3 and next(rounds, None) is None
    assert len({first.config.seed, second.config.seed, third.config.seed}) == 3
    assert second.key("generate", "pool") != third.key("generate", "pool") != first.key("generate", "pool")
    assert (run.config.select.budget, run.config.seed) == (8, 4), "the run itself still has the whole budget"
    # Again after an interruption: the same shares, whatever has been paid since.
    pay(third, 3)
    again = [(r.url, r.config) for r in open_run(config_of(run_dir, rounds=3, seed=4)).rounds()]
    assert again == [(r.url, r.config) for r in (first, second, third)]


def test_rounds_keep_their_stages_apart_and_their_times_together(run_dir):
    run = open_run(config_of(run_dir, rounds=2))
    first, second = run.rounds()
    finish(first, "generate", "k")
    assert second.finished("generate", "k") is None
    finish(second, "generate", "k", num_rows=5)
    assert first.finished("generate", "k").num_rows == 3
    first.record_time("fit:dpo", 1.0, ended_at=1.0)
    second.record_time("fit:dpo", 2.0, ended_at=2.0)
    assert [timing["seconds"] for timing in open_run(config_of(run_dir, rounds=2)).timings] == [1.0, 2.0]


def test_a_run_of_more_rounds_reuses_those_of_a_shorter_one(tmp_path):
    (one,) = open_run(config_of(tmp_path / "a", select={"budget": 4})).rounds()
    key = one.key("select", one.config.select)
    finish(one, "select", key)
    pay(one, 4)
    rounds = open_run(config_of(tmp_path / "b", rounds=2, reuse=str(tmp_path / "a"))).rounds()
    first = next(rounds)
    assert first.finished("select", first.key("select", first.config.select)) is not None
    assert first.finished("query", "k") is not None
    second = next(rounds)
    assert second.config.select.budget == 4  # what is left, though this run's own ledger has spent nothing
    assert second.finished("select", key) is None
    finish(second, "dpo", "k2")
    again = open_run(config_of(tmp_path / "c", rounds=2, reuse=str(tmp_path / "b"))).round(2)
    assert again.finished("dpo", "k2") is not None


def test_manifests_of_before_there_were_rounds_count_what_their_ledger_did(tmp_path):
    run = open_run(config_of(tmp_path / "run", rounds=2))
    run.finish("query", "k", since=0.0, num_rows=4, metrics={"label": {"spent": 3}}, summary="paid")
    assert run.round(2).config.select.budget == 5


def test_policies_of_rounds_have_names_of_their_own():
    assert [round_name("ppo", number) for number in (1, 2, 3)] == ["ppo", "ppo-2", "ppo-3"]
