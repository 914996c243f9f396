"""Runs of several rounds: every stage is told apart, counts are of all rounds, results of the last."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from rayrl.metrics.curves import MetricLog
from rayrl.report.page import render_json, write_report
from rayrl.report.policies import latest
from rayrl.report.recorded_run import read_run, title
from rayrl.report.summary import summarize_run
from rayrl.runs.stage_metrics import AskedPairs
from rayrl.runs.stage_table import (
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    GENERATE,
    IMPORTANCE,
    POOL,
    PPO_REFRESHED,
    PREFERENCES,
    PSEUDO_LABEL,
    QUERY,
    REFIT_REWARD_MODEL,
    SAMPLES,
    SELECT,
    SFT,
    SYNTHESIZE,
)
from tests.report.made_up_runs import (
    PART,
    RLP,
    agreement,
    edit_config,
    edit_metrics,
    estimate,
    evaluator_metrics,
    merged,
    policy_evaluation,
    ppo_metrics,
    proxy_dpo_metrics,
    reward_model_metrics,
    rlp_metrics,
    write_config,
    write_manifest,
)
from tests.report.page import Page


@pytest.fixture
def two_rounds(run_dir):
    """A run whose second round is under way: it has no DPO yet."""
    edit_config(run_dir, rounds=2, pseudo_label={"synthetic": True})
    edit_metrics(run_dir, QUERY, num_spent=60)
    edit_metrics(run_dir, PSEUDO_LABEL, num_pairs=900, num_synthetic=100)
    synthesized = replace(rlp_metrics()[SYNTHESIZE], num_pairs=120, acceptance_rate=0.4)
    write_manifest(run_dir, SYNTHESIZE, synthesized)
    second = proxy_dpo_metrics()
    second[QUERY] = replace(second[QUERY], num_spent=68)
    second[PSEUDO_LABEL] = replace(second[PSEUDO_LABEL], num_pairs=700, num_synthetic=50)
    second[FIT_EVALUATOR] = evaluator_metrics(estimate(0.71, 0.1, 25))
    for stage in (GENERATE, SELECT, QUERY, FIT_EVALUATOR, PSEUDO_LABEL):
        write_manifest(run_dir / "rounds" / "2", stage, second[stage], seconds=10.0)
    return run_dir


def test_stages_of_a_later_round_say_so(two_rounds):
    facts = summarize_run(str(two_rounds))
    states = {stage.stage: stage.state for stage in facts.stages}
    assert list(states)[:3] == ["pool", "sft", "generate"] and list(states)[-1] == "evaluate"
    assert (states["query"], states["query, round 2"], states["dpo"]) == ("done", "done", "done")
    assert (states["synthesize, round 2"], states["dpo, round 2"]) == ("not run", "not run")
    assert (states["candidates, round 2"], "candidates" in states) == ("not run", False)
    assert "sft, round 2" not in states and "evaluate, round 2" not in states
    assert facts.seconds == sum(stage.seconds or 0.0 for stage in facts.stages)


def test_counts_are_of_all_rounds_and_results_of_the_last(two_rounds):
    facts = summarize_run(str(two_rounds))
    assert (facts.paid.num_pairs, facts.paid.num_synthetic) == (1600, 150)
    assert facts.paid.pairs_per_query == pytest.approx(1600 / 128)
    assert facts.run.last(FIT_EVALUATOR).validation.spearman.mean == 0.71
    assert facts.run.last(DPO) == proxy_dpo_metrics()[DPO]  # the last there is
    rounds = render_json(facts)["rounds"]
    assert [metrics[QUERY.name]["num_spent"] for metrics in rounds] == [60, 68]
    assert facts.compute.training_s is None and facts.compute.first_policy_s is not None


def test_the_report_has_a_row_for_each_round(two_rounds):
    with MetricLog(str(two_rounds / "rounds" / "2"), DPO.name) as log:
        log.log(1, loss=0.69)
    write_report(str(two_rounds))
    page = Page((two_rounds / "report.html").read_text())
    for expected in (
        "Rounds round paid label queries",
        "1 60 0.61 \u00b1 0.14 900 100",
        "2 68 0.71 \u00b1 0.10 700 50 -",
        "synthetic (prompts accepted: 40.0%) 150",
        "query, round 2",
        "everything up to the end of DPO in the first round",
    ):
        assert expected in page.text


def test_a_run_of_one_round_does_not_speak_of_rounds(run_dir, rlp_run_dir):
    for folder in (run_dir, rlp_run_dir):
        assert render_json(write_report(str(folder)))["rounds"] == []
        text = Page((folder / "report.html").read_text()).text
        assert "Rounds" not in text and "round 2" not in text


@pytest.fixture
def two_rlp_rounds(rlp_run_dir):
    """A finished run of the second pipeline with two rounds."""
    edit_config(rlp_run_dir, rounds=2)
    second = rlp_metrics()
    preferences = second[PREFERENCES]
    asked = replace(preferences.asked, num_new_pairs=116, num_spent=120)
    assert isinstance(asked, AskedPairs)
    second[PREFERENCES] = replace(preferences, num_pairs=390, asked=asked)
    second[REFIT_REWARD_MODEL] = reward_model_metrics(estimate(0.79, 0.06, 28), 0.07, estimate(0.1, 0.13, 56), 480)
    second[PPO_REFRESHED] = ppo_metrics(1.9, 6.4)
    for stage, metrics in second.items():
        if stage.place == "round":
            write_manifest(rlp_run_dir / "rounds" / "2", stage, metrics, seconds=100.0)
            with MetricLog(str(rlp_run_dir / "rounds" / "2"), stage.name) as log:
                log.log(1, reward=1.0, kl=2.0)
    evaluated = second[EVALUATE]
    later = {"ppo-2": policy_evaluation(2.9, 0.8, 6.0), "rlp-2": policy_evaluation(3.1, 1.0, 6.1)}
    edit_metrics(
        rlp_run_dir,
        EVALUATE,
        policies=evaluated.policies | later,
        rewards=evaluated.rewards | {"refreshed-2": {"rlp-2": agreement(0.81, 0.04, 90)}},
    )
    path = rlp_run_dir / "stages" / EVALUATE.name / PART
    table = pq.read_table(path)
    for name in ("ppo", "rlp"):
        for column in ("response", "score", "num_tokens"):
            table = table.append_column(f"{name}-2_{column}", table[f"{name}_{column}"])
    pq.write_table(table, path)
    return rlp_run_dir


def test_the_gain_of_rlp_is_the_last_rounds(two_rlp_rounds):
    facts = summarize_run(str(two_rlp_rounds))
    assert facts.gain == policy_evaluation(3.1, 1.0, 6.1).difference
    assert facts.aligned == "rlp-2"
    assert facts.reward("refreshed").agreement == {"rlp-2": agreement(0.81, 0.04, 90)}
    assert "ppo" in facts.reward("r").agreement  # r was measured in the first round only
    assert facts.policy("rlp-2").title == "RLP, round 2" and facts.policy("ppo-2").title == "PPO, round 2"
    assert facts.paid.num_pairs == 390
    assert facts.compute.first_policy_s == 204.0
    assert facts.compute.added_s == 200.0 + 900.0  # nine stages of round 2
    assert facts.seconds == 435.0 + 900.0


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


def test_a_file_of_preferences_is_not_asked_again(tmp_path):
    data = {"rounds": 2, "preferences": {"source": "data", "data": {"path": "pairs.jsonl"}}}
    write_config(tmp_path, merged(RLP, data))
    stages = list(read_run(str(tmp_path)).manifests)
    second = [stage for stage, number in stages if number == 2]
    assert second == [SAMPLES, SYNTHESIZE, REFIT_REWARD_MODEL, PPO_REFRESHED]
    assert stages[-1] == (EVALUATE, 1) and stages[0] == (POOL, 1)
    weighted = merged(data, {"refresh": {"method": "ocrm"}})
    write_config(tmp_path, merged(RLP, weighted))
    second = [stage for stage, number in read_run(str(tmp_path)).manifests if number == 2]
    assert second == [IMPORTANCE, REFIT_REWARD_MODEL, PPO_REFRESHED]


def test_titles_and_the_latest_of_a_name():
    assert (title("dpo", 1), title("dpo", 3)) == ("dpo", "dpo, round 3")
    assert latest({"ppo", "ppo-2", "rlp"}, "ppo", 3) == "ppo-2"
    assert latest({"ppo", "ppo-2"}, "rlp", 2) == "rlp"


def test_metrics_of_a_round_and_of_the_last(two_rounds):
    run = read_run(str(two_rounds))
    assert run.metrics(QUERY, 1).num_spent == 60 and run.metrics(QUERY, 2).num_spent == 68
    assert run.last(QUERY).num_spent == 68 and run.metrics(DPO, 2) is None
    assert [metrics.num_pairs for metrics in run.all_rounds(PSEUDO_LABEL)] == [900, 700]
    assert run.has(SFT) and run.metrics(SFT, 2) is None and not run.has(PREFERENCES)
