"""Run directories that cannot be used, and disks that are too small."""

import math
import re
from pathlib import Path

from rayrl.errors import ConfigError, ResourceError, RunDirectoryError
from rayrl.preflight import check, render_plan
from rayrl.runs import storage
from rayrl.runs.run import open_run
from tests.preflight.trees import FUNCTION, MODEL, TWO_CPUS, changed, grow, layer_shapes, plan_of, refusal


def test_a_run_directory_of_another_config_is_refused(tree):
    open_run(changed(tree))
    check(changed(tree), cluster=TWO_CPUS)
    check(changed(tree, select__budget=11), cluster=TWO_CPUS)  # a budget may be raised
    message = refusal(RunDirectoryError, changed(tree, select__budget=9, seed=7))
    assert "seed (0 there, 7 now), select.budget (10 there, 9 now)" in message


def test_run_directories_that_cannot_be_used_are_refused(tree, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(RunDirectoryError, changed(tree, run_dir=str(tmp_path / "file" / "run")))
    assert message.endswith("cannot be; choose another run_dir, or give this user the right to write there")
    message = refusal(RunDirectoryError, changed(tree, reuse=str(tmp_path)))
    assert "reuse must be another run's folder" in message and message.endswith("; correct it, or leave reuse out")
    message = refusal(ConfigError, changed(tree, run_dir="nosuch://bucket/run"))
    assert "run_dir must be a path or an fsspec URL" in message
    assert message.endswith("; install the protocol's fsspec package, or correct the URL")


def test_a_relative_run_directory_is_refused_in_a_submitted_job(tree, tmp_path, monkeypatch):
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    monkeypatch.chdir(tmp_path)
    check(changed(tree, run_dir="runs/x"), cluster=TWO_CPUS)  # not submitted: it is relative to the user's folder
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    for relative in ("runs/x", "./runs/x", "file://runs/x"):
        message = refusal(ConfigError, changed(tree, run_dir=relative))
        assert message.startswith("run_dir must be an absolute path inside a Ray job") and f"got {relative};" in message
        assert "name a folder that every node sees" in message
    assert refusal(ConfigError, changed(tree, reuse="runs/y")).startswith("reuse must be an absolute path")
    for accepted in (str(tmp_path / "run"), f"file://{tmp_path}/run", "memory://runs/x"):
        check(changed(tree, run_dir=accepted), cluster=TWO_CPUS)


def test_workers_get_absolute_paths_of_every_model(rlp_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refresh = {"spg": {"entailment_model": "nli", "embedder": "model"}}
    run = open_run(changed(rlp_tree, reward_model={"path": "model"}, refresh=refresh))
    assert run.config.refresh.spg.entailment_model == str(tmp_path / "nli")
    assert run.config.refresh.spg.embedder == run.config.reward_model.path == str(tmp_path / "model")
    run = open_run(changed(rlp_tree, run_dir=str(tmp_path / "hub"), refresh={"spg": {"entailment_model": "me/nli"}}))
    assert (run.config.refresh.spg.entailment_model, run.config.refresh.spg.embedder) == ("me/nli", None)


def test_a_full_disk_is_refused(tree):
    grow(Path(tree["policy"]["path"]), 2**42)  # sparse: 4 TiB that take no room
    assert "GiB at least (weights and optimizer), and its disk has" in refusal(ResourceError, changed(tree))


def test_the_disk_must_hold_every_model_and_both_optimizers(rlp_tree):
    folder = Path(rlp_tree["policy"]["path"])
    size, num = (
        (folder / "model.safetensors").stat().st_size,
        sum(math.prod(shape) for shape in layer_shapes(MODEL).values()),
    )
    tables = 70 * 16 * 40
    # r and r^; last and best, twice; two served; and a fit has three checkpoints at once, of two optimizers
    assert plan_of(rlp_tree).disk_bytes == 8 * size + 3 * 2 * 12 * num + tables
    assert plan_of(rlp_tree, reward_model__num_members=3).disk_bytes == 12 * size + 3 * 2 * 12 * num + tables
    one_fewer = plan_of(rlp_tree, refresh__method="none").disk_bytes
    assert one_fewer == 7 * size + 3 * 2 * 12 * num + 40 * 16 * 40
    lora = {"rank": 4}
    assert plan_of(rlp_tree, ppo__lora=lora).disk_bytes == 8 * size + 3 * 12 * num + tables
    assert plan_of(rlp_tree, **FUNCTION).disk_bytes == 4 * size + 3 * 2 * 12 * num
    grow(folder, 2**42)
    assert "GiB at least (weights and optimizer), and its disk has" in refusal(ResourceError, changed(rlp_tree))


def test_what_an_earlier_attempt_wrote_needs_no_room_again(tree, monkeypatch):
    folder = Path(tree["policy"]["path"])
    grow(folder, 2**20 - (folder / "model.safetensors").stat().st_size)
    usage = type("Usage", (), {"free": 6 * 2**20, "total": 2**30})
    monkeypatch.setattr("rayrl.preflight.run_folder.shutil.disk_usage", lambda _: usage)
    config = changed(tree)  # two models and an optimizer of three
    plan = check(config, cluster=TWO_CPUS)
    assert plan.free_bytes == 6 * 2**20 and plan.disk_bytes is not None and plan.disk_bytes > 11 * 2**20
    assert any("run_dir: with all checkpoints of a fit" in warning for warning in plan.warnings)
    assert re.search(r"\ndisk     about 0\.01 GiB; 0\.01 GiB are free for run_dir\n", render_plan(plan))
    usage.free = 4 * 2**20
    assert "needs 5.0 MiB at least (weights and optimizer), and its disk has" in refusal(ResourceError, config)
    storage.write_bytes(f"{config.run_dir}/stages/sft/checkpoint/model.safetensors", bytes(2**20))
    assert check(config, cluster=TWO_CPUS).disk_bytes == plan.disk_bytes - 2**20
