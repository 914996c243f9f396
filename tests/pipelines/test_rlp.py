"""Reward learning on policy on real parts: preferences, two reward models, two PPOs, everything judged and reported."""

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from rayrl.config import load_config
from rayrl.preflight import check
from tests.pipelines.test_proxy_dpo import ROOT, config_in, manifest, planned_stages, rows, written_stages

SMALL = [
    "pool.limit=60",
    "pool.num_eval=12",
    "generate.block_size=16",
    "generate.max_tokens=24",
    "select.budget=40",
    "sft.enabled=false",  # the quickstart's model answers well enough to be M1
    "select.pooling=last",  # what clusters the samples is the fleet of the rewards
    "reward_model.epochs=1",
    "ppo.rollout_size=16",
    "ppo.batch_size=8",
    "ppo.max_rollouts=2",
    "ppo.evaluate_every=1",
    "refresh.n=3",
    "refresh.num_prompts=32",
    "refresh.spg.threshold=0.999",
    "refresh.spg.gamma=0.0",
    "evaluate.budget=96",  # of 12 prompts and 4 policies: a score, and a comparison with the reference
    "evaluate.diagnosis_budget=72",
    "evaluate.best_of_n=2",
]


def run(folder, overrides):
    """Run the pipeline inside this process's Ray cluster; returns the run's folder."""
    from rayrl.pipelines.rlp import rlp
    from rayrl.pipelines.run_pipeline import run_pipeline

    references = folder.with_name("answers.jsonl")
    prompts = (ROOT / "jobs/quickstart/prompts.jsonl").read_text().splitlines()
    references.write_text("".join(json.dumps(json.loads(row) | {"response": "Go slowly."}) + "\n" for row in prompts))
    settings = [*SMALL, f"run_dir={folder}", f"name={folder.name}"]
    settings += [f"evaluate.reference_answers.path={references}", *overrides]
    config = load_config(ROOT / "jobs/configs/rlp_quickstart.toml", settings)
    run_pipeline(config, check(config, cluster={"CPU": 4.0}), rlp, ray_start_s=0.0)
    return folder


def curve(folder, stage):
    return [json.loads(line) for line in (folder / "metrics" / f"{stage}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """One finished run that every test of this file may read, and reuse."""
    os.chdir(ROOT)
    return run(tmp_path_factory.mktemp("runs") / "rlp", [])


def test_the_plan_names_the_stages_that_the_run_then_has(finished):
    assert set(planned_stages(config_in(finished))) == written_stages(finished)


def test_every_policy_is_judged_on_the_same_prompts(finished):
    metrics = manifest(finished, "evaluate")["metrics"]
    assert set(metrics["policies"]) == {"m1", "ppo", "rlp", "best_of_n"}
    table = rows(finished, "evaluate")
    assert len(table) == metrics["num_judged"] == 12
    for name, row in metrics["policies"].items():
        assert row["score"]["mean"] == pytest.approx(np.mean([r[f"{name}_score"] for r in table]))
        assert row["difference"]["mean"] == pytest.approx(np.mean([r[f"{name}_score"] - r["m1_score"] for r in table]))
        assert row["length"] == pytest.approx(np.mean([r[f"{name}_num_tokens"] for r in table]))
    assert metrics["policies"]["best_of_n"]["kl"]["mean"] == pytest.approx(np.log(2) - 0.5)
    with sqlite3.connect(f"file:{finished / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        paid = dict(ledger.execute("select purpose, count(*) from attempts where state != 'refunded' group by purpose"))
    assert paid["label"] == manifest(finished, "preferences")["metrics"]["asked"]["ledger"]["label"]["spent"] == 40
    assert paid["evaluate"] <= 96 + 72
    references = metrics["references"]
    assert (references["by"], references["num_prompts"]) == ("random", 12)
    assert set(references["policies"]) == set(metrics["policies"])
    assert all(policy["win_rate"]["num"] == 12 for policy in references["policies"].values())


def test_the_refreshed_reward_model_learnt_from_the_synthetic_pairs_too(finished):
    num = {stage: manifest(finished, stage)["num_rows"] for stage in ("fit_reward_model", "refit_reward_model")}
    synthetic = rows(finished, f"synthesize/{manifest(finished, 'synthesize')['key']}")
    assert len(synthetic) == manifest(finished, "synthesize")["num_rows"] > 0
    assert num["fit_reward_model"] < num["refit_reward_model"] <= num["fit_reward_model"] + len(synthetic)
    versions = {r["policy_version"] for row in rows(finished, "samples") for r in row["responses"]}
    (version,) = versions
    assert version.startswith("ppo-"), "the samples are the policy's, not M1's"


def test_both_ppos_start_at_m1_and_are_tracked_to_their_ends(finished):
    for stage in ("ppo", "ppo_refreshed"):
        m1, *steps = curve(finished, stage)
        assert m1["step"] == 0 and [row["step"] for row in steps] == [1, 2]
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-2)
        assert all(row["held_out_reward"] is not None for row in (m1, *steps))
    points = manifest(finished, "track_rewards")["metrics"]["points"]
    places = [("ppo", 0), ("ppo", 1), ("ppo", 2), ("ppo_refreshed", 1), ("ppo_refreshed", 2)]
    assert [(point["ppo"], point["step"]) for point in points] == places
    assert all(set(point["rewards"]) == {"r", "refreshed"} for point in points)
    assert manifest(finished, "audit_pairs")["metrics"]["num_audited"] > 0
    assert not [path for path in Path("/dev/shm").glob("rayrl-*") if any(path.iterdir())], "weights are left behind"


def test_the_report_misses_nothing(finished):
    html = (finished / "report.html").read_text()
    assert "not run" not in html and "M1, best of 2" in html


def test_a_second_run_does_nothing_again(finished):
    def engines():
        return [t for t in json.loads((finished / "timings.json").read_text()) if t["what"].startswith("engine:")]

    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()}
    started = engines()
    run(finished, [])
    assert engines() == started != []
    assert {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_second_ppo_on_the_old_reward_model_is_another_ppo(finished):
    folder = run(finished.with_name("none"), ["refresh.method=none", f"reuse={finished}"])
    assert manifest(folder, "ppo")["key"] == manifest(finished, "ppo")["key"]
    assert [row["reward"] for row in curve(folder, "ppo")[1:]] != [
        row["reward"] for row in curve(folder, "ppo_refreshed")[1:]
    ]
    assert not (folder / "stages" / "refit_reward_model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uml", "ocrm", "self_judged", "reward_pairs"])
def test_every_other_refresh_runs(finished, method):
    folder = run(finished.with_name(method), [f"refresh.method={method}", f"reuse={finished}"])
    policies = manifest(folder, "evaluate")["metrics"]["policies"]
    assert policies["rlp"]["score"]["num"] == 12
    assert "not run" not in (folder / "report.html").read_text()


@pytest.mark.slow
def test_ppo_on_a_python_function_and_on_an_evaluator(ray_cluster, finished):
    os.chdir(ROOT)
    scripted = ["ppo.reward=function", "ppo.function=tests.oracles.length_oracle:reward", f"reuse={finished}"]
    asked = ["ppo.reward=evaluator", "select.budget=24", "evaluator.epochs=2", f"reuse={finished}"]
    for name, overrides in (("function", scripted), ("evaluator", asked)):
        folder = run(finished.with_name(name), overrides)
        assert set(manifest(folder, "evaluate")["metrics"]["policies"]) == {"m1", "ppo", "best_of_n"}
        html = (folder / "report.html").read_text()
        assert "M1, best of 2" in html and "along PPO: not run" not in html
