"""The run directory: who may continue it, and which stages are finished."""

import os
import uuid
from dataclasses import replace

import pytest

from rayrl.config import GenerateConfig, RunConfig, SelectConfig
from rayrl.errors import DataError, RunDirectoryError
from rayrl.metrics.curves import read_metrics
from rayrl.runs import storage
from rayrl.runs.run import differences, num_label_queries, open_run, read_manifest, round_name
from rayrl.runs.stage_metrics import AskedPairs
from rayrl.runs.stage_table import DPO, EVALUATE, GENERATE, PPO, PREFERENCES, QUERY, SELECT
from tests.fakes import made_up


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
    metrics = made_up(stage.metrics)
    return run.finish(stage, key, since=0.0, num_rows=num_rows, metrics=metrics, summary="done")


def work_of(manifest):
    """A manifest without its files, which another store describes otherwise."""
    return replace(manifest, files={})


def finished_stages(run):
    return {stage.name for stage in (GENERATE, SELECT, QUERY) if run.manifest(stage) is not None}


def test_a_stage_is_finished_when_its_manifest_says_so(run_dir):
    run = open_run(config_of(run_dir))
    assert run.finished(GENERATE, "k1") is None
    written = finish(run, GENERATE, "k1")
    again = open_run(config_of(run_dir))
    assert again.finished(GENERATE, "k1") == written
    assert again.finished(SELECT, "k1") is None
    assert finished_stages(again) == {"generate"}


def test_other_work_of_a_stage_begins_in_an_empty_folder(run_dir):
    run = open_run(config_of(run_dir))
    assert run.finished(GENERATE, "k1") is None
    half_done = run.folder(GENERATE, "table", "part-00000.parquet")
    storage.write_bytes(half_done, b"rows of k1")
    storage.write_bytes(run.curve(GENERATE), b"{}")
    assert run.finished(GENERATE, "k1") is None
    assert storage.exists(half_done)  # the same work goes on
    assert run.finished(GENERATE, "k2") is None
    assert not storage.exists(half_done) and not storage.exists(run.curve(GENERATE))
    finish(run, GENERATE, "k2")
    assert run.finished(GENERATE, "k3") is None
    assert run.manifest(GENERATE) is None


@pytest.mark.parametrize(("stage", "kept"), [(EVALUATE, "answers-m1-v"), (SELECT, "embeddings-v")])
def test_tables_that_name_their_own_work_outlive_other_work(run_dir, stage, kept):
    run = open_run(config_of(run_dir))
    assert run.finished(stage, "k1") is None
    for table in (kept, "table", "comparisons-m1"):
        storage.write_bytes(run.folder(stage, table, "part-00000.parquet"), b"rows")
    finish(run, stage, "k1")
    assert run.finished(stage, "k2") is None
    assert storage.children(run.folder(stage)) == [kept, "work.json"]
    assert storage.exists(run.folder(stage, kept, "part-00000.parquet"))


def test_half_a_copy_of_another_run_is_not_gone_on_from(tmp_path, monkeypatch):
    first = open_run(config_of(tmp_path / "earlier"))
    assert first.finished(EVALUATE, "k1") is None
    for name in ("answers-m1-v/part-0", "table/part-0", "a", "z"):
        storage.write_bytes(first.folder(EVALUATE, name), b"rows")
    finish(first, EVALUATE, "k1")
    run = open_run(config_of(tmp_path / "run", reuse=first.url))
    assert run.finished(EVALUATE, "k0") is None
    link = storage._link

    def killed(source, target):
        if source.endswith(("manifest.json", "work.json")):
            raise KeyboardInterrupt
        link(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "_link", killed)
        run.finished(EVALUATE, "k1")
    assert storage.exists(run.folder(EVALUATE, "z"))
    again = open_run(config_of(tmp_path / "run"))
    assert again.finished(EVALUATE, "k1") is None
    assert storage.children(again.folder(EVALUATE)) == ["work.json"]
    assert open_run(config_of(tmp_path / "run", reuse=first.url)).finished(EVALUATE, "k1") is not None


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
    assert "Set them back; or choose another run_dir, with reuse" in message
    assert "oracle.ledger" in message and "delete" not in message  # a run's folder holds what was paid for


@pytest.mark.parametrize(
    "change",
    [
        {"oracle": {"type": "scripted", "function": "a:b", "timeout_s": 300.0, "requests_per_minute": 60}},
        {"generators": {"num_replicas": 4}, "name": "other"},
        {"dpo": {"num_workers": 2, "zero_stage": 3}},
        {"select": {"budget": 16}, "evaluate": {"budget": 256}},
    ],
)
def test_the_operation_of_a_run_may_change_and_its_budgets_may_grow(run_dir, change):
    first = open_run(config_of(run_dir))
    again = open_run(config_of(run_dir, **change))
    assert again.id == first.id
    assert storage.read_json(storage.join(again.url, "config.json")) == again.config.model_dump(mode="json")


def test_a_budget_does_not_shrink(run_dir):
    open_run(config_of(run_dir))
    with pytest.raises(RunDirectoryError, match=r"select.budget \(8 there, 4 now\)"):
        open_run(config_of(run_dir, select={"budget": 4}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rounds": 2}, "with rounds = 2 each round has a share"),
        ({"select": {"budget": 8, "strategy": "random"}}, 'strategy "random" picks other responses'),
    ],
)
def test_a_label_budget_is_not_raised_where_others_would_be_selected(run_dir, settings, reason):
    first = open_run(config_of(run_dir, **settings))
    settings = settings | {"evaluate": {"budget": 256}}  # this one may be raised
    open_run(config_of(run_dir, **settings))
    larger = {"select": {**settings.get("select", {}), "budget": 16}}
    with pytest.raises(RunDirectoryError) as refused:
        open_run(config_of(run_dir, **(settings | larger)))
    message = str(refused.value)
    assert reason in message and "(8 there, 16 now)" in message
    assert f"reuse = '{first.url}'" in message and f"oracle.ledger = '{first.url}/ledger.sqlite'" in message
    open_run(config_of(run_dir, **settings))


def test_the_control_expert_asks_about_all_whatever_the_strategy(run_dir):
    settings = {"labels": "expert"}
    first = open_run(config_of(run_dir, **settings, select={"budget": 8, "strategy": "random"}))
    again = open_run(config_of(run_dir, **settings, select={"budget": 16, "strategy": "random"}))
    assert (again.id, again.budget) == (first.id, 16)


def test_damaged_files_of_a_run_are_named(tmp_path):
    open_run(config_of(tmp_path / "run"))
    (tmp_path / "run" / "timings.json").write_text("[{")
    assert open_run(config_of(tmp_path / "run")).timings == []
    (tmp_path / "run" / "identity.json").write_text("{")
    with pytest.raises(DataError, match=r"identity.json must hold the id .* column run"):
        open_run(config_of(tmp_path / "run"))
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json must be the resolved config"):
        open_run(config_of(tmp_path / "run"))


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
    key = run.key(GENERATE, GenerateConfig(), "pool", 3, None)
    assert key == open_run(config_of(tmp_path / "a")).key(GENERATE, GenerateConfig(), "pool", 3, None)
    others = [
        run.key(SELECT, GenerateConfig(), "pool", 3, None),
        run.key(GENERATE, GenerateConfig(k=8), "pool", 3, None),
        run.key(GENERATE, GenerateConfig(), "other pool", 3, None),
        run.key(GENERATE, GenerateConfig(), "pool", "3", None),
        run.key(GENERATE, GenerateConfig(), "pool", 3),
        run.key(GENERATE, SelectConfig(budget=1), "pool", 3, None),
        other_seed.key(GENERATE, GenerateConfig(), "pool", 3, None),
    ]
    assert len({key, *others}) == 8


@pytest.mark.parametrize("source", ["", "memory://"])
def test_reuse_takes_over_a_finished_stage_and_its_files(run_dir, tmp_path, source):
    earlier = f"{source}{tmp_path}/earlier" if not source else f"memory://{uuid.uuid4().hex}/earlier"
    first = open_run(config_of(earlier))
    storage.write_bytes(first.folder(GENERATE, "table", "part-00000.parquet"), b"rows")
    written = finish(first, GENERATE, "k1")
    run = open_run(config_of(run_dir, reuse=earlier))
    assert run.finished(GENERATE, "k2") is None
    assert finished_stages(run) == set()
    assert work_of(run.finished(GENERATE, "k1")) == work_of(written)
    assert finished_stages(run) == {"generate"}
    assert storage.exists(run.folder(GENERATE, "table", "part-00000.parquet"))
    assert work_of(open_run(config_of(run_dir)).finished(GENERATE, "k1")) == work_of(written)


@pytest.mark.parametrize("source", ["", "memory://"])
def test_reuse_takes_over_the_curve_of_a_training(tmp_path, source):
    earlier = f"{source}{tmp_path}/earlier" if not source else f"memory://{uuid.uuid4().hex}/earlier"
    first = open_run(config_of(earlier))
    theirs = storage.join(first.url, "metrics", "ppo.jsonl")
    storage.write_bytes(theirs, b'{"step": 1, "kl": 0.5}\n')
    finish(first, PPO, "k1")
    run = open_run(config_of(tmp_path / "run", reuse=earlier))
    mine = storage.join(run.url, "metrics", "ppo.jsonl")
    assert run.finished(PPO, "k2") is None and not storage.exists(mine)
    run.finished(PPO, "k1")
    assert read_metrics(mine) == [{"step": 1, "kl": 0.5}]
    with open(mine, "a") as curve:  # goes on without touching the other run's
        curve.write('{"step": 2, "kl": 0.6}\n')
    assert (len(read_metrics(mine)), len(read_metrics(theirs))) == (2, 1)


def test_reuse_takes_nothing_from_a_stage_that_is_not_finished(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    storage.write_bytes(first.folder(GENERATE, "table", "part-00000.parquet"), b"rows")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    assert run.finished(GENERATE, "k1") is None
    assert run.manifest(GENERATE) is None and not storage.exists(run.folder(GENERATE, "table"))


def test_reuse_replaces_what_another_attempt_left(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    storage.write_bytes(first.folder(GENERATE, "table", "part-00000.parquet"), b"rows")
    written = finish(first, GENERATE, "k1")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    finish(run, GENERATE, "k0", num_rows=1)
    assert run.finished(GENERATE, "k1") == written
    assert open_run(config_of(tmp_path / "run")).finished(GENERATE, "k1") == written


def test_reuse_links_instead_of_copying_on_one_disk(tmp_path):
    first = open_run(config_of(tmp_path / "earlier"))
    part = (GENERATE, "table", "part-00000.parquet")
    storage.write_bytes(first.folder(*part), b"rows")
    finish(first, GENERATE, "k1")
    run = open_run(config_of(tmp_path / "run", reuse=str(tmp_path / "earlier")))
    run.finished(GENERATE, "k1")
    assert os.stat(run.folder(*part)).st_ino == os.stat(first.folder(*part)).st_ino


def test_local_model_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    run = open_run(config_of("run"))
    assert run.config.policy.path == str(tmp_path / "model")
    assert run.url == str(tmp_path / "run")
    open_run(config_of("run"))


def pay(run, num, stage=QUERY):
    """Finish a paid stage that cost so many label queries."""
    if stage is QUERY:
        metrics = made_up(QUERY.metrics, num_spent=num)
    else:
        metrics = made_up(PREFERENCES.metrics, asked=made_up(AskedPairs, num_spent=num))
    run.finish(stage, "k", since=0.0, num_rows=num, metrics=metrics, summary="paid")


def test_one_round_is_the_run_itself(run_dir):
    run = open_run(config_of(run_dir))
    (only,) = run.rounds()
    assert (only.url, only.seed, only.budget, only.round) == (run.url, run.seed, run.budget, 1)
    assert only.key(SELECT, only.config.select, "k") == run.key(SELECT, run.config.select, "k")


def test_a_later_round_has_a_folder_a_seed_and_what_is_left(run_dir):
    run = open_run(config_of(run_dir, rounds=3, seed=4))
    rounds = run.rounds()
    first = next(rounds)
    assert (first.url, first.seed, first.budget) == (run.url, 4, 3)
    pay(first, 2)  # one was refunded
    second = next(rounds)
    assert second.url == f"{run.url}/rounds/2"
    assert second.folder(QUERY, "table") == f"{run.url}/rounds/2/stages/query/table"
    assert second.budget == 3
    pay(second, 3, PREFERENCES)
    third = next(rounds)
    assert third.budget == 3 and next(rounds, None) is None
    assert len({first.seed, second.seed, third.seed}) == 3
    assert second.key(GENERATE, "pool") != third.key(GENERATE, "pool") != first.key(GENERATE, "pool")
    assert (run.budget, run.seed) == (8, 4), "the run itself still has the whole budget"
    assert all(view.config is run.config for view in (first, second, third)), "no round has a config of its own"
    # Again after an interruption: the same shares, whatever has been paid since.
    pay(third, 3)
    again = [(r.url, r.seed, r.budget) for r in open_run(config_of(run_dir, rounds=3, seed=4)).rounds()]
    assert again == [(r.url, r.seed, r.budget) for r in (first, second, third)]
    assert num_label_queries(run.url) == 2


def test_rounds_keep_their_stages_apart_and_their_times_together(run_dir):
    run = open_run(config_of(run_dir, rounds=2))
    first, second = run.rounds()
    finish(first, GENERATE, "k")
    assert second.finished(GENERATE, "k") is None
    finish(second, GENERATE, "k", num_rows=5)
    assert first.finished(GENERATE, "k").num_rows == 3
    first.record_time("fit:dpo", 1.0, ended_at=1.0)
    second.record_time("fit:dpo", 2.0, ended_at=2.0)
    assert [timing["seconds"] for timing in open_run(config_of(run_dir, rounds=2)).timings] == [1.0, 2.0]


def test_a_run_of_more_rounds_reuses_those_of_a_shorter_one(tmp_path):
    (one,) = open_run(config_of(tmp_path / "a", select={"budget": 4})).rounds()
    key = one.key(SELECT, one.config.generate)
    finish(one, SELECT, key)
    pay(one, 4)
    rounds = open_run(config_of(tmp_path / "b", rounds=2, reuse=str(tmp_path / "a"))).rounds()
    first = next(rounds)
    assert first.finished(SELECT, first.key(SELECT, first.config.generate)) is not None
    assert first.finished(QUERY, "k") is not None
    second = next(rounds)
    assert second.budget == 4  # what is left, though this run's own ledger has spent nothing
    assert second.finished(SELECT, key) is None
    finish(second, DPO, "k2")
    _, again = open_run(config_of(tmp_path / "c", rounds=2, reuse=str(tmp_path / "b"))).rounds()
    assert again.finished(DPO, "k2") is not None


@pytest.mark.parametrize("broken", ["{", '{"stage": "query"}', "renamed"])
def test_a_manifest_that_is_damaged_or_of_another_version_is_refused_by_its_path(tmp_path, broken):
    run = open_run(config_of(tmp_path))
    path = run.folder(QUERY, "manifest.json")
    pay(run, 3)
    if broken == "renamed":
        broken = storage.read_bytes(path).decode().replace("num_spent", "num_payed")
    storage.write_bytes(path, broken.encode())
    with pytest.raises(DataError, match=r"query/manifest.json must be .* what was paid stays in the ledger"):
        read_manifest(run.url, QUERY)


def test_a_run_of_another_version_cannot_be_reused(tmp_path):
    earlier = open_run(config_of(tmp_path / "a"))
    pay(earlier, 3)
    storage.write_bytes(earlier.folder(QUERY, "manifest.json"), b'{"stage": "query"}')
    run = open_run(config_of(tmp_path / "b", reuse=str(tmp_path / "a")))
    with pytest.raises(DataError, match=r"reuse must name .* of this version .*leave reuse out"):
        run.finished(QUERY, "k")


def test_policies_of_rounds_have_names_of_their_own():
    assert [round_name("ppo", number) for number in (1, 2, 3)] == ["ppo", "ppo-2", "ppo-3"]
