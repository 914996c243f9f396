"""The whole pipeline on real parts: vLLM, DeepSpeed under Ray Train, Ray Data. Small enough for two cores."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayrl.config import RunConfig, load_config
from rayrl.preflight import check
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
SMALL = [
    "pool.limit=60",
    "pool.num_eval=12",
    "generate.k=3",
    "generate.block_size=16",
    "generate.max_tokens=32",
    "sft.batch_size=64",
    "select.budget=24",
    "evaluator.epochs=4",
    "dpo.epochs=1",
    "evaluate.budget=24",
]


def run(folder, overrides, config="jobs/configs/quickstart.toml"):
    """Run the pipeline inside this process's Ray cluster; returns the run's folder."""
    from rayrl.pipelines.proxy_dpo import proxy_dpo
    from rayrl.pipelines.run_pipeline import run_pipeline

    config = load_config(ROOT / config, [*SMALL, f"run_dir={folder}", f"name={folder.name}", *overrides])
    run_pipeline(config, check(config, cluster={"CPU": 4.0}), proxy_dpo, ray_start_s=0.0)
    return folder


def manifest(folder, stage):
    return json.loads((folder / "stages" / stage / "manifest.json").read_text())


def written_stages(folder):
    """Stages that left a manifest, without the members of an ensemble."""
    names = {path.parent.name for path in (folder / "stages").glob("*/manifest.json")}
    return {name for name in names if not name.rpartition("-")[2].isdigit()}


def config_in(folder):
    """The config that a finished run was started with."""
    return RunConfig.model_validate_json((folder / "config.json").read_text())


def planned_stages(config):
    return [stage.name for stage in check(config, cluster={"CPU": 4.0}).stages]


def rows(folder, stage, table="table"):
    parts = sorted((folder / "stages" / stage / table).glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """One finished run that every test of this file may read, and reuse."""
    os.chdir(ROOT)
    return run(tmp_path_factory.mktemp("runs") / "finished", [])


def test_the_plan_names_the_stages_that_the_run_then_has(finished):
    assert set(planned_stages(config_in(finished))) == written_stages(finished)


def test_every_stage_leaves_its_table_and_manifest(finished):
    responses = [response for row in rows(finished, "generate") for response in row["responses"]]
    counts = manifest(finished, "generate")["metrics"]
    assert counts["num_responses"] == len(responses)
    assert counts["num_responses"] + counts["num_empty"] + counts["num_duplicates"] == 48 * 3
    assert {response["policy_version"] for response in responses} == {responses[0]["policy_version"]}
    assert all(response["logprob"] < 0 for response in responses)
    query_set = {row["response_id"] for row in rows(finished, "select")}
    assert len(query_set) == 24 and query_set <= {response["id"] for response in responses}
    judged = rows(finished, "query")
    assert [j["response_id"] for j in judged] == [row["response_id"] for row in rows(finished, "select")]
    assert manifest(finished, "query")["metrics"]["ledger"]["label"]["spent"] == 24


def test_pairs_prefer_the_higher_score_and_keep_the_oracles_scores(finished):
    pairs = rows(finished, "pseudo_label")
    assert 0 < len(pairs) <= 48
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    judged = {j["response_id"]: j["score"] for j in rows(finished, "query")}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            if pair[f"{side}_id"] in judged:
                assert pair[f"{side}_score"] == judged[pair[f"{side}_id"]]
    assert {pair["source"] for pair in pairs} & {"mixed", "evaluator"}


def test_dpo_moves_the_policy_towards_its_pairs(finished):
    curve = [json.loads(line) for line in (finished / "metrics" / "dpo.jsonl").read_text().splitlines()]
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=2e-3)  # generation's log-probabilities are the reference's
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_the_evaluation_is_paired_and_has_its_own_budget(finished):
    table = rows(finished, "evaluate")
    assert len(table) == 12
    metrics = manifest(finished, "evaluate")["metrics"]
    differences = [row["m2_score"] - row["m1_score"] for row in table]
    difference = metrics["policies"]["m2"]["difference"]
    assert difference["mean"] == pytest.approx(sum(differences) / 12)
    assert difference["num"] == 12 == metrics["num_judged"]
    assert set(metrics["policies"]) == {"m1", "m2"} and set(metrics["rewards"]) == {"evaluator"}
    # The answers are sampled at temperature 0.9, the KL is of the policy itself.
    (own,) = (finished / "stages" / "evaluate").glob("answers-own-*")
    lengths = [len(row["responses"][0]["token_ids"]) for row in rows(finished, "evaluate", own.name)]
    m2 = metrics["policies"]["m2"]
    assert (m2["kl"]["num"], m2["kl_length"]) == (12, pytest.approx(sum(lengths) / 12))
    assert metrics["policies"]["m1"]["kl"] == {"mean": 0.0, "standard_error": 0.0, "num": 12}
    with sqlite3.connect(f"file:{finished / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        paid = dict(ledger.execute("select purpose, count(*) from attempts where state = 'scored' group by purpose"))
    assert paid["label"] == 24 and paid["evaluate"] <= 24
    assert (finished / "report.html").stat().st_size > 10_000


def test_a_second_run_does_nothing_again(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()}
    run(finished, [])
    assert {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_another_familys_lora_with_a_scalar_evaluator_in_turn(ray_cluster, tmp_path):
    """Qwen2, scalar evaluator on the pooling replicas, random selection, margin pairs, IPO, LoRA, mode `alternate`."""
    os.chdir(ROOT)
    model = make_tiny_model(tmp_path / "qwen2", "qwen2")
    folder = run(
        tmp_path / "qwen2-run",
        [
            f"policy.path={model}",
            "select.strategy=random",
            "evaluator.type=scalar",
            "evaluator.lora.rank=4",
            "pseudo_label.pairing=margin",
            "pseudo_label.mode=alternate",
            "dpo.loss=ipo",
            "dpo.lora.rank=4",
            "dpo.reference=pass",
            "oracle.function=tests.oracles.length_oracle:judge",
        ],
    )
    assert manifest(folder, "pseudo_label")["metrics"]["num_pairs"] > 0
    assert manifest(folder, "evaluate")["metrics"]["policies"]["m2"]["kl"]["num"] > 0
    assert (folder / "stages" / "dpo" / "references.json").exists()


@pytest.mark.parametrize(
    ("control", "overrides"),
    [
        ("expert", ["labels=expert"]),
        pytest.param("direct", ["labels=direct", "select.unit=prompt"], marks=pytest.mark.slow),
        pytest.param("off-policy", ["generate.source=seed", "pool.limit=60"], marks=pytest.mark.slow),
    ],
)
def test_controls_are_one_line_and_share_finished_stages(finished, tmp_path, control, overrides):
    folder = run(tmp_path / control, [*overrides, f"reuse={finished}"])
    assert manifest(folder, "sft")["finished_at"] == manifest(finished, "sft")["finished_at"]
    pairs = rows(folder, "pseudo_label")
    if control == "off-policy":
        assert all(row["response_id"].startswith("seed-") for row in rows(folder, "select"))
        assert pairs and {pair["source"] for pair in pairs} == {"evaluator"}
        return
    assert {pair["source"] for pair in pairs} == {"oracle"}
    assert not (folder / "stages" / "fit_evaluator").exists()
    paid = manifest(folder, "query")["metrics"]["ledger"]["label"]["spent"]
    assert paid == (manifest(finished, "generate")["metrics"]["num_responses"] if control == "expert" else 24)


@pytest.mark.slow
def test_a_driver_killed_in_mid_generation_continues_to_the_same_tables(finished, tmp_path):
    """kill -9 of the job, then the same command again: nothing lost, doubled or paid twice, and the same rows."""
    folder = tmp_path / "killed"
    command = [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", *SMALL]
    command += [f"run_dir={folder}", "name=killed"]
    environment = os.environ | {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1"}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((folder / "stages" / "generate" / "table").glob("part-*")):
        assert job.poll() is None and time.monotonic() < deadline, "the job did not start to generate"
        time.sleep(0.2)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (folder / "stages" / "generate" / "manifest.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400, capture_output=True)
    for stage in ("generate", "select", "query"):
        assert rows(folder, stage) == rows(finished, stage) or stage == "query"
    ours, theirs = rows(folder, "query"), rows(finished, "query")
    assert [(j["response_id"], j["score"]) for j in ours] == [(j["response_id"], j["score"]) for j in theirs]
    assert manifest(folder, "query")["metrics"]["ledger"]["label"]["spent"] == 24
