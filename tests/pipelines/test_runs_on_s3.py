"""Whole runs whose directory is in a bucket: nothing of them is on a disk that a second machine would miss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayrl.runs import storage
from tests.pipelines.test_rlp import SMALL as SMALL_RLP
from tests.s3_server import new_bucket, s3_server

ROOT = Path(__file__).parents[2]
SMALL = [
    "pool.limit=36",
    "pool.num_eval=8",
    "generate.k=3",
    "generate.block_size=16",
    "generate.max_tokens=24",
    "sft.batch_size=64",
    "select.budget=16",
    "evaluator.epochs=2",
    "dpo.epochs=1",
    "dpo.checkpoint_every=1",
    "evaluate.budget=16",
]
STAGES = ["pool", "sft", "generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate"]
STAGES_RLP = ["pool", "generate", "select", "preferences", "fit_reward_model", "ppo", "samples", "synthesize"]
STAGES_RLP += ["refit_reward_model", "ppo_refreshed", "evaluate"]


@pytest.fixture
def environment(monkeypatch):
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield environment


def run(job, config, settings):
    """The job as a user starts it; what it logged."""
    ran = subprocess.run(
        [sys.executable, f"jobs/{job}.py", f"jobs/configs/{config}.toml", *settings],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "config", "settings", "stages", "fit"),
    [("proxy_dpo", "quickstart", SMALL, STAGES, "dpo"), ("rlp", "rlp_quickstart", SMALL_RLP, STAGES_RLP, "ppo")],
)
def test_a_run_lives_in_a_bucket_and_a_rerun_finds_everything_done(environment, job, config, settings, stages, fit):
    run_dir = f"{new_bucket()}/runs/small"
    settings = [*settings, "name=s3", f"run_dir={run_dir}"]
    run(job, config, settings)
    written = storage.sizes(run_dir)
    assert {f"stages/{stage}/manifest.json" for stage in stages} <= written.keys()
    assert written["report.html"] > 10_000
    for name in ("ledger.sqlite", "timings.json", f"stages/{fit}/checkpoint/model.safetensors", f"metrics/{fit}.jsonl"):
        assert written[name] > 0
    assert any(name.startswith(f"tensorboard/{fit}/events.out.tfevents") for name in written)
    assert not [name for name in written if name.startswith(f"stages/{fit}/fit/")], "a finished fit gives them back"
    spent = storage.read_json(f"{run_dir}/report.json")["paid"]["label"]["spent"]
    assert spent == next(int(s.partition("=")[2]) for s in settings if s.startswith("select.budget"))
    assert not any(value in storage.read_bytes(f"{run_dir}/config.json").decode() for value in environment.values())
    manifests = {stage: storage.read_bytes(f"{run_dir}/stages/{stage}/manifest.json") for stage in stages}

    assert run(job, config, settings).count("already finished") >= len(stages)
    assert {s: storage.read_bytes(f"{run_dir}/stages/{s}/manifest.json") for s in stages} == manifests
    unchanged = {name: size for name, size in written.items() if name.startswith("stages/")}
    assert unchanged == {n: size for n, size in storage.sizes(run_dir).items() if n.startswith("stages/")}
    assert storage.read_json(f"{run_dir}/report.json")["paid"]["label"]["spent"] == spent


def test_a_bucket_that_is_not_there_or_does_not_answer_is_refused_before_work_starts(environment, monkeypatch):
    from rayrl.config import load_config
    from rayrl.errors import RunDirectoryError
    from rayrl.preflight.run_folder import check_run_folder

    def check(url):
        check_run_folder(load_config(ROOT / "jobs/configs/quickstart.toml", [f"run_dir={url}"]))

    there = new_bucket()
    check(f"{there}/run")
    assert storage.sizes(there) == {}, "looking makes nothing"
    with pytest.raises(RunDirectoryError, match=r"run_dir must be in a bucket that exists .* s3://nobody-made-it/run"):
        check("s3://nobody-made-it/run")
    assert not storage.exists("s3://nobody-made-it")
    storage.locate(there)[0].clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunDirectoryError, match=r"run_dir must be a place that can be read, .* the endpoint"):
        check(f"{there}/run")
