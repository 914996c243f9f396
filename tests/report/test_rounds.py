"""Runs of several rounds: every stage is told apart, counts are of all rounds, results of the last."""

import json

import pyarrow.parquet as pq
import pytest

from rayrl.metrics.curves import MetricLog
from rayrl.report.page import write_report
from rayrl.report.rounds import latest, stages_by_round, titled, untitled
from rayrl.report.stages import AFTER, BEFORE
from rayrl.report.summary import gain, summarize_run
from tests.report.conftest import made_up_metrics
from tests.report.manifests import edit_metrics, estimate, write_manifest
from tests.report.page import Page
from tests.report.rlp_run import policy_row, ppo_metrics, reward_metrics, rlp_metrics


def edit_config(run_dir, **changes):
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def two_rounds(run_dir):
    """A run whose second round is under way: it has no DPO yet."""
    edit_config(run_dir, rounds=2, pseudo_label={"pairing": "best_worst", "synthetic": True})
    edit_metrics(run_dir, "query", num_spent=60)
    edit_metrics(run_dir, "pseudo_label", num_pairs=900, num_synthetic=100)
    write_manifest(run_dir, "synthesize", {"num_pairs": 120, "acceptance_rate": 0.4})
    second = made_up_metrics()
    second["query"]["num_spent"] = 68
    second["pseudo_label"] |= {"num_pairs": 700, "num_synthetic": 50}
    second["fit_evaluator"]["validation"]["spearman"] = estimate(0.71, 0.1, 25)
    for stage in ("generate", "select", "query", "fit_evaluator", "pseudo_label"):
        write_manifest(run_dir / "rounds" / "2", stage, second[stage], seconds=10.0)
    return run_dir


def test_stages_of_a_later_round_say_so(two_rounds):
    facts = summarize_run(str(two_rounds))
    states = {stage["stage"]: stage["state"] for stage in facts["stages"]}
    assert list(states)[:2] == ["sft", "generate"] and list(states)[-1] == "evaluate"
    assert (states["query"], states["query, round 2"], states["dpo"]) == ("done", "done", "done")
    assert (states["synthesize, round 2"], states["dpo, round 2"]) == ("not run", "not run")
    assert "sft, round 2" not in states and "evaluate, round 2" not in states
    one = summarize_run(str(two_rounds.parent / "made-up"))["seconds"]
    assert one == facts["seconds"] == sum(stage["seconds"] or 0.0 for stage in facts["stages"])


def test_counts_are_of_all_rounds_and_results_of_the_last(two_rounds):
    facts = summarize_run(str(two_rounds))
    assert (facts["paid"]["num_pairs"], facts["paid"]["num_synthetic"]) == (1600, 150)
    assert facts["paid"]["pairs_per_query"] == pytest.approx(1600 / 128)
    assert facts["metrics"]["fit_evaluator"]["validation"]["spearman"]["mean"] == 0.71
    assert facts["metrics"]["dpo"] == made_up_metrics()["dpo"]  # the last there is
    assert [of["query"]["num_spent"] for of in facts["rounds"]] == [60, 68]


def test_the_report_has_a_row_for_each_round(two_rounds):
    with MetricLog(str(two_rounds / "rounds" / "2"), "dpo") as log:
        log.log(1, loss=0.69)
    write_report(str(two_rounds))
    page = Page((two_rounds / "report.html").read_text())
    for expected in (
        "Rounds round paid label queries",
        "1 60 0.61 \u00b1 0.14 900 100",
        "2 68 0.71 \u00b1 0.10 700 50 -",
        "synthetic (prompts accepted: 40.0%) 150",
        "query, round 2",
    ):
        assert expected in page.text


def test_a_run_of_one_round_does_not_speak_of_rounds(run_dir, rlp_run_dir):
    for folder in (run_dir, rlp_run_dir):
        assert write_report(str(folder))["rounds"] == []
        text = Page((folder / "report.html").read_text()).text
        assert "Rounds" not in text and "round 2" not in text


@pytest.fixture
def two_rlp_rounds(rlp_run_dir):
    """A finished run of the second pipeline with two rounds."""
    edit_config(rlp_run_dir, rounds=2)
    second = rlp_metrics()
    second["preferences"] |= {"num_pairs": 390, "num_new_pairs": 116, "num_spent": 120}
    second["refit_reward_model"] = reward_metrics(0.79, 0.07, 0.1, 480)
    second["ppo_refreshed"] = ppo_metrics(1.9, 6.4)
    for stage, metrics in second.items():
        if stage not in (*BEFORE, *AFTER):
            write_manifest(rlp_run_dir / "rounds" / "2", stage, metrics, seconds=100.0)
            with MetricLog(str(rlp_run_dir / "rounds" / "2"), stage) as log:
                log.log(1, reward=1.0, kl=2.0)
    evaluated = rlp_metrics()["evaluate"]
    evaluated["policies"]["ppo-2"] = policy_row(2.9, 0.8, 6.0)
    evaluated["policies"]["rlp-2"] = policy_row(3.1, 1.0, 6.1)
    evaluated["reward_accuracy"]["refreshed-2"] = {"rlp-2": estimate(0.81, 0.04, 90)}
    edit_metrics(rlp_run_dir, "evaluate", **evaluated)
    path = rlp_run_dir / "stages" / "evaluate" / "table" / "part-00000.parquet"
    table = pq.read_table(path)
    for name in ("ppo", "rlp"):
        for column in ("response", "score"):
            table = table.append_column(f"{name}-2_{column}", table[f"{name}_{column}"])
    pq.write_table(table, path)
    return rlp_run_dir


def test_the_gain_of_rlp_is_the_last_rounds(two_rlp_rounds):
    facts = summarize_run(str(two_rlp_rounds))
    assert gain(facts) == policy_row(3.1, 1.0, 6.1)["difference"]
    assert facts["rlp"]["latest"] == {"ppo": "ppo-2", "rlp": "rlp-2", "r": "r", "refreshed": "refreshed-2"}
    assert facts["rlp"]["titles"]["rlp-2"] == "RLP, round 2"
    assert facts["paid"]["num_pairs"] == 390
    assert facts["rlp"]["compute"]["plain_rlhf_s"] == 200.0
    assert facts["rlp"]["compute"]["refresh_s"] == 200.0 + 800.0  # nine stages of round 2, one within another
    assert facts["seconds"] == 431.0 + 800.0


def test_the_report_shows_the_policies_of_every_round(two_rlp_rounds):
    write_report(str(two_rlp_rounds))
    page = Page((two_rlp_rounds / "report.html").read_text())
    for expected in (
        "RLP, round 2 3.10 \u00b1 0.11 +1.00 \u00b1 0.09",
        "2 120 390 0.71 \u00b1 0.06 0.79 \u00b1 0.06 101 1.317 1.900",
        "answers of RLP, round 2",
        "ppo_refreshed, round 2",
    ):
        assert expected in page.text


def test_a_file_of_preferences_is_not_asked_again():
    data = {"pipeline": "rlp", "rounds": 2, "preferences": {"source": "data"}}
    stages = stages_by_round(data)
    assert [name for name, number in stages if number == 2] == [
        "samples",
        "synthesize",
        "importance",
        "refit_reward_model",
        "ppo_refreshed",
    ]
    assert stages[-1] == ("evaluate", 1) and stages[0] == ("pool", 1)


def test_titles_and_the_latest_of_a_name():
    assert (titled("dpo", 1), titled("dpo", 3), untitled("dpo, round 3"), untitled("dpo")) == (
        "dpo",
        "dpo, round 3",
        "dpo",
        "dpo",
    )
    assert latest({"ppo", "ppo-2", "rlp"}, "ppo", 3) == "ppo-2"
    assert latest({"ppo", "ppo-2"}, "rlp", 2) == "rlp"
