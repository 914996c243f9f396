"""The report: everything it must show, whatever is missing, and nothing a model wrote may act."""

import json
import re
import shutil
from dataclasses import replace

import fsspec
import pyarrow.parquet as pq
import pytest

from rayrl.errors import RunDirectoryError
from rayrl.report.page import render_json, write_report
from rayrl.runs.run import read_manifest
from rayrl.runs.stage_metrics import (
    ImportanceMetrics,
    PairFileCounts,
    ReferenceEvaluation,
    ReferencesEvaluation,
)
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    EVALUATE,
    FIT_EVALUATOR,
    IMPORTANCE,
    PPO,
    PPO_REFRESHED,
    PREFERENCES,
    PSEUDO_LABEL,
    REFIT_REWARD_MODEL,
    SAMPLES,
    SYNTHESIZE,
)
from tests.report.made_up_runs import (
    PART,
    PROXY_DPO,
    edit_config,
    edit_metrics,
    estimate,
    evaluator_metrics,
    leave_ppo_alone,
    proxy_dpo_metrics,
    rlp_metrics,
    write_comparisons,
    write_config,
    write_judgements,
    write_manifest,
)
from tests.report.page import Page


def report(run_dir):
    facts = write_report(str(run_dir))
    assert json.loads((run_dir / "report.json").read_text()) == render_json(facts)
    return Page((run_dir / "report.html").read_text())


def read_json(run_dir):
    return json.loads((run_dir / "report.json").read_text())


def evaluated(run_dir):
    manifest = read_manifest(str(run_dir), EVALUATE)
    assert manifest is not None
    return manifest.metrics


def remove(run_dir, *stages):
    for stage in stages:
        shutil.rmtree(run_dir / "stages" / stage.name)


def test_a_finished_run_shows_everything(run_dir):
    page = report(run_dir)
    for expected in (
        "made-up-run",
        "seed 3",
        "the method itself, no control",
        "+0.45 \u00b1 0.11 gain in mean oracle score, M2 minus M1, n = 64",
        "66.0% \u00b1 5.0 win rate of M2 against M1",
        "63.0% \u00b1 5.5 win rate, length-controlled",
        "128 / 128 paid label queries",
        "128 / 128 paid evaluation queries",
        "9.1 preference pairs per paid query",
        "cost, USD 0.41",
        "abstained (no label) 4",
        "prompts in the pool 1,200",
        "responses pseudo-labelled by the evaluator 4,672",
        "preference pairs 1,163 ties dropped 37 pairs per paid query 9.1",
        "M1 2.11 \u00b1 0.14 - - - 0.000 \u00b1 0.000 4.90 0.412 0.231 46.8",
        "M2 2.56 \u00b1 0.15 +0.45 \u00b1 0.11 66.0% \u00b1 5.0 63.0% \u00b1 5.5 4.20 \u00b1 0.30",
        "4.20 \u00b1 0.30 5.60 0.398 0.252 51.3",
        "perplexity is under M1; distinct-2 is higher and self-BLEU lower where answers are more diverse",
        "Answers are sampled at temperature 0.7 and top_p 0.9. KL is to M1, per response, of the policy itself, on "
        "samples of its own at temperature 1 and top_p 1;",
        "64 prompts judged per policy",
        "Spearman, held-out judgements (19) 0.61 \u00b1 0.14",
        "held-out judgements within one point 84.0% validation loss 0.83",
        "orders an answer and M1's as the oracle does the evaluator answers of M2 0.67 \u00b1 0.06",
        "rank correlation (Spearman) with the oracle's scores the evaluator answers of M2 0.55 \u00b1 0.11 "
        "answers of M2 ranked 64",
        "strategy k_center candidates 4,800 selected 128 covering radius at the end 0.1237",
        "everything up to the end of DPO 5 min 56 s",
        "sft: 2 responses cut to the context, and 1 examples left out because their prompts fill it.",
        "dpo: 5,210 tokens per second, 6.0% padding.",
        "engine:generate 2 34.2",
        "small fox and its friend number 63",
        "DPO beta 0.1",
        "oracle model judge-large",
    ):
        assert expected in page.text
    assert "not run" not in page.text and "not measured" not in page.text
    assert len(page.figures) == 6


@pytest.mark.parametrize(
    ("name", "write", "labels"),
    [
        ("run_dir", write_judgements, "judgements 95 of prompts 48"),
        ("rlp_run_dir", write_comparisons, "comparisons 56"),
    ],
)
def test_labels_with_vectors_have_their_meter(request, name, write, labels):
    run_dir = request.getfixturevalue(name)
    num_figures = len(report(run_dir).figures)
    assert "What more labels would buy" not in report(run_dir).text and read_json(run_dir)["meter"] is None
    write(run_dir)
    page = report(run_dir)
    assert "What more labels would buy" in page.text and labels in page.text
    assert "labels that 95% of it takes" in page.text and "the next 100 labels add" in page.text
    assert len(page.figures) == num_figures + 1
    found = read_json(run_dir)["meter"]
    assert found["family"] in ("power law", "exponential") and len(found["measured"]) == 8


def test_few_labels_have_a_meter_without_a_curve(run_dir):
    write_judgements(run_dir, 10)
    page = report(run_dir)
    assert "What more labels would buy is not known yet: a curve takes 32 judgements of 16 prompts" in page.text
    assert len(page.figures) == 6


@pytest.mark.parametrize(("name", "limit"), [("run_dir", 1_000_000), ("rlp_run_dir", 1_500_000)])
def test_the_file_stands_alone_and_is_small(request, name, limit):
    run_dir = request.getfixturevalue(name)
    page = report(run_dir)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert (run_dir / "report.html").stat().st_size < limit


def test_model_output_is_text_and_nothing_else(run_dir):
    page = report(run_dir)
    assert "script" not in page.tags
    assert "<script>alert('x')</script> & <img src=http://evil.example/a onerror=alert(1)> {{ 7*7 }}" in page.text
    assert "\u202e" not in page.text
    assert "default-src 'none'" in (run_dir / "report.html").read_text()


def test_a_gain_without_standard_error_is_not_shown(run_dir):
    policies = evaluated(run_dir).policies
    m2 = replace(policies["m2"], difference=estimate(0.45, None))
    edit_metrics(run_dir, EVALUATE, policies=policies | {"m2": m2})
    page = report(run_dir)
    assert "+0.45" not in page.text
    assert "Before you believe these numbers" in page.text


@pytest.mark.parametrize(
    "missing", ["timings.json", "metrics", "stages"] + [f"stages/{stage.name}" for stage in proxy_dpo_metrics()]
)
def test_whatever_is_missing_the_rest_is_shown(run_dir, missing):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(run_dir)
    if missing != "timings.json":
        assert "not run" in page.text


def test_a_run_that_has_not_begun(tmp_path):
    write_config(tmp_path, PROXY_DPO)
    page = report(tmp_path)
    assert "Evaluator calibration: not run" in page.text
    assert "Sample answers: not run" in page.text
    assert "M1 not run not run" in page.text and "M2 not run not run" in page.text
    assert page.figures == []


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"labels": "direct", "select": {"unit": "prompt"}}, ["The evaluator", "fit_evaluator", "calibration"]),
        ({"labels": "expert"}, ["The evaluator", "Covering radius", "Coverage of"]),
        ({"select": {"strategy": "random"}}, ["Covering radius", "Coverage of"]),
        ({"sft": {"enabled": False}}, ["sft"]),
        ({}, ["synthetic (prompts accepted", "Synthetic preferences", "PPO", "refresh", "RLP"]),
    ],
)
def test_what_a_run_will_never_have_is_not_shown_as_not_run(tmp_path, changes, absent):
    write_config(tmp_path, PROXY_DPO)
    edit_config(tmp_path, **changes)
    text = report(tmp_path).text
    for name in absent:
        assert name not in text


def test_optional_benchmarks_and_references_are_shown_when_there(run_dir):
    references = ReferencesEvaluation(
        by="scores",
        num_prompts=64,
        policies={
            name: ReferenceEvaluation(win_rate=estimate(mean, 0.05), num_abstained=0)
            for name, mean in (("m1", 0.3), ("m2", 0.4))
        },
    )
    lm_eval = {"m1": {"mmlu": {"acc,none": 0.25}}, "m2": {"mmlu": {"acc,none": 0.2512, "other": 1.0}}}
    edit_metrics(run_dir, EVALUATE, lm_eval=lm_eval, references=references)
    page = report(run_dir)
    assert "benchmark metric M1 M2 mmlu acc,none 0.25 0.2512 mmlu other - 1" in page.text
    assert "M1 2.11 \u00b1 0.14 - - - 30.0% \u00b1 5.0" in page.text
    assert "63.0% \u00b1 5.5 40.0% \u00b1 5.0" in page.text
    assert "references compare scores: this oracle compares no answers itself; it abstained on 0 of 128" in page.text


def test_synthetic_pairs_of_proxy_dpo_have_a_section(run_dir):
    edit_config(run_dir, pseudo_label={"synthetic": True})
    write_manifest(run_dir, SYNTHESIZE, rlp_metrics()[SYNTHESIZE])
    page = report(run_dir)
    assert "synthetic preferences prompts 200 pairs 101 acceptance rate 50.5%" in page.text
    assert "Synthetic preferences The share of a prompt's samples that mean the same." in page.text
    assert "synthetic (prompts accepted: 50.5%) 0" in page.text and "samples of plain PPO" not in page.text
    assert "Confidence of the largest cluster" in page.figures
    edit_metrics(run_dir, SYNTHESIZE, num_pairs=0)
    assert "No pair was accepted , of 200 prompts: DPO learnt from the scored pairs alone." in report(run_dir).text


def test_a_remote_run_directory(run_dir):
    memory = fsspec.filesystem("memory")
    memory.put(str(run_dir), "/test_report", recursive=True)
    try:
        assert write_report("memory://test_report").paid.num_pairs == 1163
        assert b"+0.45" in memory.cat_file("/test_report/report.html")
    finally:
        memory.rm("/test_report", recursive=True)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="must be the folder of a run"):
        write_report(str(tmp_path))


def test_a_finished_run_of_the_second_pipeline_shows_everything(rlp_run_dir):
    page = report(rlp_run_dir)
    over_ppo = read_json(rlp_run_dir)["gain_over_ppo"]
    for expected in (
        "made-up-rlp seed 3 \u00b7 7 min 15 s in finished stages",
        "the method itself, no control",
        "+0.79 \u00b1 0.09 gain in mean oracle score, RLP minus M1, n = 120",
        f"{over_ppo['mean']:+.2f} \u00b1 {over_ppo['standard_error']:.2f} gain of RLP over plain PPO, n = 119",
        "69.8% \u00b1 4.0 win rate of RLP against M1",
        "300 / 300 paid preference queries",
        "660 / 680 paid evaluation queries",
        "M1 2.10 \u00b1 0.11 - - - 31.0% \u00b1 4.2",
        "plain PPO 2.47 \u00b1 0.11 +0.37 \u00b1 0.09 59.2% \u00b1 4.0",
        "57.4% \u00b1 4.3 34.7% \u00b1 4.2 6.30 \u00b1 0.20",
        "5.60 0.391 0.247 50.2",
        "RLP 2.89 \u00b1 0.11 +0.79 \u00b1 0.09 69.8% \u00b1 4.0 65.8% \u00b1 4.3 38.9% \u00b1 4.2",
        "5.90 \u00b1 0.20 5.40 0.402 0.239 49.1",
        "120 prompts judged per policy",
        "M1, best of 4 2.60 \u00b1 0.11 +0.50 \u00b1 0.09",
        "at most 0.64",
        "held-out prompts (76 in all)",
        "of 50 possible pairs the oracle agrees with 72.0% \u00b1 6.4",
        "accuracy 0.71 \u00b1 0.06 0.74 \u00b1 0.06",
        "calibration error 0.093 0.081",
        "rank correlation with length +0.21 \u00b1 0.13 +0.18 \u00b1 0.13",
        "pairs learnt from 246 347",
        "answers of plain PPO 0.66 \u00b1 0.05 0.69 \u00b1 0.05 answers of RLP 0.63 \u00b1 0.06 0.720 \u00b1 0.049",
        "answers of plain PPO compared (ties left out) 94 94 answers of RLP compared (ties left out) 97 97",
        "wins of the first position 51.8%",
        "reward, last tenth 1.317 1.522",
        "KL, nats per response 6.21 5.87",
        "samples per second 24.3 24.3 generation, s 41.2 41.2 reward, s 12.6 12.6 training, s 63.9 63.9",
        "weight sync, share of the time 6.4% 6.4%",
        "pairs 101 acceptance rate 50.5% refused: low confidence 83 refused: one cluster 16",
        "length of the chosen, tokens 31.4 length of the rejected, tokens 29.2 gap, tokens +2.2",
        "pairs read by the entailment model 6,021",
        "plain RLHF: everything up to the first PPO 3 min 24 s",
        "RLP in all 6 min 44 s",
        "RLP, times plain RLHF 1.98",
        "Tell a story about fox number 119.",
        "rlp says: the fox <b>ran</b> home.",
        "gamma 0.5",
        "Answers are sampled at temperature 0.7 and top_p 0.9. KL is to M1, per response, of the policy itself, on "
        "samples of its own at temperature 1 and top_p 1;",
        "Win rates compare the oracle's scores of single answers. Win rates against the references are the oracle's "
        "verdicts on an answer and the reference side by side, asked about in one drawn order; it abstained on 8 of "
        "480, which are left out.",
    ):
        assert expected in page.text
    assert "not run" not in page.text
    assert "not measured" not in page.text
    assert len(page.figures) == 7


@pytest.mark.parametrize(
    "missing",
    ["timings.json", "ledger.sqlite", "metrics", "stages"] + [f"stages/{stage.name}" for stage in rlp_metrics()],
)
def test_whatever_is_missing_of_the_second_pipeline_the_rest_is_shown(rlp_run_dir, missing):
    path = rlp_run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(rlp_run_dir)
    if missing not in ("timings.json", "ledger.sqlite"):
        assert "not run" in page.text
    if missing == "ledger.sqlite":  # the manifests know, too
        assert "660 / 680 paid evaluation queries" in page.text


def test_every_moment_of_a_run_has_a_report(rlp_run_dir):
    """Stages in reverse: what a run looks like after each of them."""
    for stage in reversed(rlp_metrics()):
        remove(rlp_run_dir, stage)
        page = report(rlp_run_dir)
    assert "RLP in all not run" in page.text
    assert "Sample answers: not run" in page.text


def test_a_run_without_a_refresh_has_two_policies(rlp_run_dir):
    """A study's run that ends at plain PPO."""
    remove(rlp_run_dir, SAMPLES, SYNTHESIZE, REFIT_REWARD_MODEL, PPO_REFRESHED)
    table = rlp_run_dir / "stages" / EVALUATE.name / PART
    columns = [name for name in pq.read_schema(table).names if not name.startswith("rlp")]
    pq.write_table(pq.read_table(table, columns=columns), table)
    two = {name: evaluated(rlp_run_dir).policies[name] for name in ("m1", "ppo")}
    edit_metrics(rlp_run_dir, EVALUATE, policies=two, rewards={})
    page = report(rlp_run_dir)
    assert "gain in mean oracle score, plain PPO minus M1" in page.text
    assert "plain PPO 2.47 \u00b1 0.11 +0.37 \u00b1 0.09" in page.text
    assert "ppo says: the fox <b>ran</b> home." in page.text and "best_of_n says" not in page.text


def test_a_run_that_accepted_no_pair_says_so(rlp_run_dir):
    none = {"outcomes": {"one_cluster": 200}, "pairs_by_gamma": dict.fromkeys(["0.0", "0.5"], 0)}
    edit_metrics(rlp_run_dir, SYNTHESIZE, num_pairs=0, acceptance_rate=0.0, embedding_acceptance_rate=0.31, **none)
    page = report(rlp_run_dir)
    effect = (
        "the refreshed reward model learnt from the old preferences alone, so this run does not test the refresh. "
        "Clusters of embeddings would accept 31.0% of the prompts."
    )
    assert f"No pair was accepted , of 200 prompts: {effect}" in page.text
    assert f"No synthetic pair was accepted: {effect}" in page.text
    assert "Pairs accepted at each gamma" not in page.text


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", "Nothing was sampled, paired or refitted"),
        ("none", "second PPO on the old reward model"),
        ("none", "gain in mean oracle score, second PPO minus M1"),
        ("ocrm", "Mean weight: 0.950"),
        ("uml", "Multi-view learning on 1,580 samples"),
        ("reward_pairs", "samples by the old reward model is paired with the worst; nothing was clustered"),
        ("self_judged", "samples by the policy's own judgement is paired with the worst; nothing was clustered"),
    ],
)
def test_every_refresh_has_its_words(rlp_run_dir, method, expected):
    edit_config(rlp_run_dir, refresh={"method": method})
    write_manifest(rlp_run_dir, IMPORTANCE, ImportanceMetrics(mean_weight=0.95))
    edit_metrics(rlp_run_dir, SYNTHESIZE, method=method, clustering=None, confidences={}, pairs_by_gamma={})
    page = report(rlp_run_dir)
    assert expected in page.text and "not run" not in page.text


def test_pairs_of_a_file_cost_nothing(rlp_run_dir):
    edit_config(rlp_run_dir, preferences={"source": "data", "data": {"path": "pairs.jsonl"}})
    (rlp_run_dir / "ledger.sqlite").unlink()
    counts = dict.fromkeys(["num_unusable", "num_tied", "num_other_prompt", "num_truncated", "num_too_long"], 0)
    file = PairFileCounts(num_prompts=250, num_rows=280, num_same_when_cut=0, **counts)
    edit_metrics(rlp_run_dir, PREFERENCES, file=file, asked=None)
    page = report(rlp_run_dir)
    assert "0 / 0 paid preference queries" in page.text
    assert "preferences (of a file) pairs 274 prompts 250 rows read 280" in page.text
    assert "What was asked" not in page.text and "responses sampled from M1" not in page.text


def test_what_the_context_was_too_short_for_is_counted(run_dir):
    fitted = evaluator_metrics(estimate(0.61, 0.14, 19), num_too_long=2)
    write_manifest(run_dir, FIT_EVALUATOR, replace(fitted, num_too_long=3))
    edit_metrics(run_dir, PSEUDO_LABEL, num_abstained=128, num_too_long=120)
    page = report(run_dir)
    for expected in (
        "too long for its context: learnt from / held out 3 / 2",
        "responses pseudo-labelled by the evaluator 4,672 too long for the evaluator's context 120",
    ):
        assert expected in page.text


def test_rollouts_without_a_reward_are_counted_by_their_reasons(rlp_run_dir):
    assert "responses 3,072 3,072 without a reward 0 0 samples per second" in report(rlp_run_dir).text
    edit_metrics(rlp_run_dir, PPO, num_abstained=1000, num_timed_out=900)
    page = report(rlp_run_dir)
    assert "without a reward 1,000 0 no answer within ppo.function_timeout_s 900 0 samples per second" in page.text
    assert "ppo: 1000 of 4072 responses had no reward and taught nothing (0 too long, 900 timed out)." in page.text


def test_pairs_of_a_file_that_the_context_was_too_short_for_are_counted(rlp_run_dir):
    edit_config(rlp_run_dir, preferences={"source": "data", "data": {"path": "pairs.jsonl"}})
    counts = dict.fromkeys(["num_unusable", "num_tied", "num_other_prompt", "num_same_when_cut"], 0)
    file = PairFileCounts(num_prompts=250, num_rows=280, num_truncated=4, num_too_long=2, **counts)
    edit_metrics(rlp_run_dir, PREFERENCES, file=file, asked=None)
    assert "left out, as their prompts fill it 4 / 2" in report(rlp_run_dir).text


def test_without_a_refresh_nothing_is_called_refreshed(rlp_run_dir):
    edit_config(rlp_run_dir, refresh={"method": "none"})
    remove(rlp_run_dir, SAMPLES, SYNTHESIZE, REFIT_REWARD_MODEL, AUDIT_PAIRS)
    page = report(rlp_run_dir)
    assert "held-out pairs r accuracy" in page.text and "both PPOs in all" in page.text
    assert "refreshed" not in page.text.replace("ppo_refreshed", "") and "RLP " not in page.text
    assert "answers of second PPO 0.63 \u00b1 0.06" in page.text


SHARED = (
    "+0.37 \u00b1 0.09 gain in mean oracle score, PPO minus M1, n = 120",
    "59.2% \u00b1 4.0 win rate of PPO against M1",
    "PPO 2.47 \u00b1 0.11 +0.37 \u00b1 0.09 59.2% \u00b1 4.0",
    "reward, last tenth 1.317",
    "Tell a story about fox number 119.",
    "ppo says: the fox <b>ran</b> home.",
    "One seed:",
)
EXPECTED = {
    "evaluator": (
        "control: PPO on an evaluator of actively selected labels",
        "control: random selection",
        "300 / 300 paid label queries",
        "Spearman, held-out judgements (44) 0.60 \u00b1 0.10",
        "answers of PPO 0.70 \u00b1 0.05",
        "everything up to the end of PPO 2 min 47 s",
        "evaluator scalar",
    ),
    "function": (
        "control: PPO on the function rewards:jokes",
        "0 / 0 paid label queries",
        "answers of PPO 0.70 \u00b1 0.05",
        "everything up to the end of PPO 2 min 31 s",
        "reward function rewards:jokes",
    ),
}


@pytest.mark.parametrize("reward", EXPECTED)
def test_ppo_on_another_reward_has_its_report(rlp_run_dir, reward):
    leave_ppo_alone(rlp_run_dir, reward)
    page = report(rlp_run_dir)
    for expected in (*SHARED, *EXPECTED[reward]):
        assert expected in page.text
    for unknown in ("RLP", "refresh", "plain PPO", "Preferences", "preference queries", "gamma", "not run"):
        assert unknown not in page.text
    facts = read_json(rlp_run_dir)
    assert facts["gain"]["mean"] == 0.37
    assert [(policy["name"], policy["title"]) for policy in facts["policies"]] == [("m1", "M1"), ("ppo", "PPO")]
    expected = ["pool", "sft", "ppo", "evaluate"]
    expected[2:2] = ["generate", "select", "query", "fit_evaluator"] if reward == "evaluator" else []
    assert [stage["stage"] for stage in facts["stages"]] == expected


@pytest.mark.parametrize("missing", ["metrics", "stages/ppo", "stages/evaluate/manifest.json", "stages/sft"])
@pytest.mark.parametrize("reward", EXPECTED)
def test_ppo_on_another_reward_has_a_report_at_every_moment(rlp_run_dir, reward, missing):
    path = leave_ppo_alone(rlp_run_dir, reward) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(rlp_run_dir)
    assert "RLP" not in page.text and "not run" in page.text


@pytest.mark.parametrize(
    ("by", "expected"),
    [("both", "in both orders, a disagreement being a tie;"), ("scores", "this oracle compares no answers itself;")],
)
def test_win_rates_against_references_say_what_they_compare(rlp_run_dir, by, expected):
    references = evaluated(rlp_run_dir).references
    edit_metrics(rlp_run_dir, EVALUATE, references=replace(references, by=by))
    assert expected in report(rlp_run_dir).text
    edit_metrics(rlp_run_dir, EVALUATE, references=None)
    text = report(rlp_run_dir).text
    assert "against references" not in text and "the references" not in text
    assert "scores of single answers. Answers are sampled at temperature" in text


def test_a_policy_that_said_nothing_has_no_kl(rlp_run_dir):
    policies = evaluated(rlp_run_dir).policies
    silent = replace(policies["rlp"], kl=None, perplexity=None, length=0.0, distinct2=0.0)
    edit_metrics(rlp_run_dir, EVALUATE, policies=policies | {"rlp": silent})
    page = report(rlp_run_dir)
    assert "38.9% \u00b1 4.2 not measured - 0.000" in page.text


def test_rounds_of_ppo_on_an_evaluator_have_their_table(rlp_run_dir):
    leave_ppo_alone(rlp_run_dir, "evaluator")
    edit_config(rlp_run_dir, rounds=2)
    page = report(rlp_run_dir)
    assert "evaluator's rank correlation reward of PPO 1 300 0.60 \u00b1 0.10 1.317 2 - - -" in page.text


def test_an_answer_that_was_not_judged_has_a_dash(rlp_run_dir):
    report(rlp_run_dir)
    html = (rlp_run_dir / "report.html").read_text()
    samples = read_json(rlp_run_dir)["samples"]
    assert len(samples) == 20 and set(samples[0]["answers"]) == {"m1", "ppo", "rlp", "best_of_n"}
    assert samples[0]["answers"]["ppo"] == {
        "response": "ppo says: the fox <b>ran</b> home. ",
        "score": samples[0]["answers"]["ppo"]["score"],
        "num_tokens": 9,
    }
    shown = re.findall(r'class="score \w*">([^<]*)<', html)
    assert len(shown) == 80 and all(score == "-" or score.isdecimal() for score in shown)
