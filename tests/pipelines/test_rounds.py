"""Both pipelines in two rounds on real parts: what carries over, what is drawn anew, and one budget for all."""

import json
import math
import os
import sqlite3

import pytest

from rayrl.config import load_config
from rayrl.preflight import check
from tests.pipelines.test_proxy_dpo import ROOT, SMALL, manifest, rows

SPG = ["refresh.spg.clustering=embedding", "refresh.spg.threshold=0.999", "refresh.spg.gamma=0.0"]
TWO_ROUNDS = [*SMALL, "rounds=2", "pseudo_label.synthetic=true", *SPG]
TWO_ROUNDS += ["select.strategy=entropy", "select.first_batch=k_center"]
RLP = [
    "pool.limit=60",
    "pool.num_eval=12",
    "generate.block_size=16",
    "generate.max_tokens=24",
    "select.budget=40",
    "reward_model.epochs=1",
    "ppo.rollout_size=16",
    "ppo.batch_size=8",
    "ppo.max_rollouts=2",
    "refresh.n=3",
    "refresh.num_prompts=32",
    "evaluate.budget=60",
    "evaluate.diagnosis_budget=0",
    "evaluate.best_of_n=0",
]


def run(name, folder, config, overrides):
    """Run a pipeline inside this process's Ray cluster; returns the run's folder."""
    import importlib

    from rayrl.pipelines.run_pipeline import run_pipeline

    pipeline = getattr(importlib.import_module(f"rayrl.pipelines.{name}"), name)
    loaded = load_config(ROOT / config, [*overrides, f"run_dir={folder}", f"name={folder.name}"])
    run_pipeline(loaded, check(loaded, cluster={"CPU": 4.0}), pipeline, ray_start_s=0.0)
    return folder


def paid_labels(folder):
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        (num,) = ledger.execute("select count(*) from attempts where purpose = 'label' and state != 'refunded'")
    return num[0]


def versions(folder):
    """Who wrote the responses."""
    return {response["policy_version"] for row in rows(folder, "generate") for response in row["responses"]}


@pytest.fixture(scope="module")
def proxy(ray_cluster, tmp_path_factory):
    """Two rounds of proxy_dpo with synthetic pairs, in mode `overlap`; the second asks by the first one's evaluator."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("runs") / "two-rounds"
    return run("proxy_dpo", folder, "jobs/configs/quickstart.toml", TWO_ROUNDS)


@pytest.mark.slow
def test_two_rounds_share_one_budget_and_ask_nothing_twice(proxy):
    second = proxy / "rounds" / "2"
    spent = [manifest(folder, "query")["metrics"]["num_spent"] for folder in (proxy, second)]
    assert spent == [12, 12] and paid_labels(proxy) == 24
    asked = [{(row["prompt_id"], row["response"]) for row in rows(folder, "query")} for folder in (proxy, second)]
    assert len(asked[0]) == len(asked[1]) == 12 and not asked[0] & asked[1]
    judged_again = {(row["prompt_id"], r["text"]) for row in rows(second, "candidates") for r in row["responses"]}
    assert not asked[0] & judged_again


@pytest.mark.slow
def test_the_second_round_asks_about_what_the_first_ones_evaluator_is_least_sure_of(proxy):
    second = proxy / "rounds" / "2"
    first, later = (manifest(folder, "select")["metrics"] for folder in (proxy, second))
    assert (first["strategy"], first["num_unread"], later["strategy"]) == ("k_center", None, "entropy")
    (table,) = (second / "stages" / "select").glob("entropies-*")
    assert not list((proxy / "stages" / "select").glob("entropies-*"))
    entropies = [row["entropy"] for row in rows(second, "select", table.name)]
    names = [response["id"] for row in rows(second, "candidates") for response in row["responses"]]
    known = {name: value for name, value in zip(names, entropies, strict=True) if value is not None}
    assert later["num_unread"] == len(names) - len(known) and len(known) >= 12
    assert all(0 <= value <= math.log(6) + 1e-9 for value in known.values()) and len(set(known.values())) > 12
    chosen = [known[row["response_id"]] for row in rows(second, "select")]
    assert chosen == sorted(known.values(), reverse=True)[:12]


@pytest.mark.slow
def test_a_later_round_starts_from_the_policy_of_the_one_before(proxy):
    second = proxy / "rounds" / "2"
    (first_writer,), (second_writer,) = versions(proxy), versions(second)
    assert first_writer.startswith("sft-") and second_writer.startswith("dpo-")
    for folder in (proxy, second):
        curve = [json.loads(line) for line in (folder / "metrics" / "dpo.jsonl").read_text().splitlines()]
        assert curve[0]["loss"] == pytest.approx(0.6931, abs=2e-3)  # it is its own reference
    trained = [manifest(folder, "fit_evaluator") for folder in (proxy, second)]
    num = [made["num_rows"] + made["metrics"]["validation"]["num"] for made in trained]
    assert num[1] > num[0], "the evaluator of the second round learns from both rounds' judgements"
    assert not (second / "stages" / "sft").exists() and not (second / "stages" / "evaluate").exists()


@pytest.mark.slow
def test_synthetic_pairs_join_the_labelled_ones_once(proxy):
    for folder in (proxy, proxy / "rounds" / "2"):
        pairs = rows(folder, "pseudo_label")
        names = [(pair["chosen_id"], pair["rejected_id"]) for pair in pairs]
        assert len(names) == len(set(names))
        synthetic = [pair for pair in pairs if pair["source"] == "spg"]
        metrics = manifest(folder, "pseudo_label")["metrics"]
        assert (metrics["num_synthetic"], metrics["num_pairs"]) == (len(synthetic), len(pairs))
        assert 0 < len(synthetic) <= manifest(folder, "synthesize")["num_rows"]
        assert all(pair["chosen_reference_logprob"] < 0 for pair in pairs), "the round's own policy wrote them"
    assert "query, round 2" in (proxy / "report.html").read_text()


@pytest.mark.slow
def test_a_second_run_of_two_rounds_does_nothing_again(proxy):
    before = {path: path.stat().st_mtime_ns for path in proxy.rglob("stages/**/*") if path.is_file()}
    run("proxy_dpo", proxy, "jobs/configs/quickstart.toml", TWO_ROUNDS)
    assert {path: path.stat().st_mtime_ns for path in proxy.rglob("stages/**/*") if path.is_file()} == before


@pytest.mark.slow
def test_rlp_compares_the_last_policys_responses_in_its_second_round(ray_cluster, tmp_path):
    os.chdir(ROOT)
    folder = run("rlp", tmp_path / "rlp", "jobs/configs/rlp_quickstart.toml", [*RLP, "rounds=2", *SPG])
    second = folder / "rounds" / "2"
    first_d, both = (manifest(of, "preferences")["metrics"] for of in (folder, second))
    assert (first_d["asked"]["num_spent"], both["asked"]["num_spent"]) == (20, 20) and paid_labels(folder) == 40
    assert both["num_pairs"] == first_d["num_pairs"] + both["asked"]["num_new_pairs"]
    assert [row["chosen_id"] for row in rows(second, "preferences")][: first_d["num_pairs"]] == [
        row["chosen_id"] for row in rows(folder, "preferences")
    ]
    (writer,) = versions(second)
    assert writer.startswith("ppo_refreshed-")
    evaluated = manifest(folder, "evaluate")["metrics"]
    assert set(evaluated["policies"]) == {"m1", "ppo", "rlp", "ppo-2", "rlp-2"}
    assert set(evaluated["rewards"]) == {"r", "refreshed", "r-2", "refreshed-2"}
    assert "RLP, round 2" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_rlp_on_a_file_repeats_the_refresh_and_pays_nothing(ray_cluster, tmp_path):
    os.chdir(ROOT)
    lines = (ROOT / "jobs/quickstart/prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[-40:]]
    pairs = [{"prompt": p, "chosen": "First, look, because it helps.", "rejected": "um whatever"} for p in prompts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    preferences = f'preferences={{data = {{path = "{tmp_path / "pairs.jsonl"}"}}}}'
    overrides = [*RLP, "rounds=2", "refresh.method=uml", preferences]
    folder = run("rlp", tmp_path / "file", "jobs/configs/rlp_quickstart.toml", overrides)
    second = folder / "rounds" / "2"
    assert {path.name.rpartition("-")[0] or path.name for path in (second / "stages").iterdir()} == {
        "samples",
        "refit_reward_model",
        "ppo_refreshed",
    }
    assert list(manifest(folder, "evaluate")["metrics"]["policies"]) == ["m1", "ppo", "rlp", "rlp-2"]
    (writer,) = {r["policy_version"] for row in rows(second, "samples") for r in row["responses"]}
    assert writer.startswith("ppo_refreshed-") and paid_labels(folder) == 0
