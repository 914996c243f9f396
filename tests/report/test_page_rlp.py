"""The report of the second pipeline: every number is there, and whatever is missing, the rest is."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from rayrl.report.page import write_report
from tests.report.manifests import edit_metrics
from tests.report.page import Page
from tests.report.rlp_run import leave_ppo_alone, rlp_metrics


def report(run_dir):
    facts = write_report(str(run_dir))
    assert json.loads((run_dir / "report.json").read_text()) == facts
    return Page((run_dir / "report.html").read_text())


def edit_config(run_dir, **changes):
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_finished_run_shows_everything(rlp_run_dir):
    page = report(rlp_run_dir)
    over_ppo = json.loads((rlp_run_dir / "report.json").read_text())["rlp"]["gain_over_ppo"]
    for expected in (
        "made-up-rlp seed 3 \u00b7 7 min 11 s in finished stages",  # the selection is part of the preferences
        "the method itself, no control",
        "+0.79 \u00b1 0.09 gain in mean expert score, RLP minus M1, n = 120",
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
        "of 50 possible pairs the expert agrees with 72.0% \u00b1 6.4",
        "accuracy 0.71 \u00b1 0.06 0.74 \u00b1 0.06",
        "calibration error 0.093 0.081",
        "rank correlation with length +0.21 \u00b1 0.13 +0.18 \u00b1 0.13",
        "pairs learnt from 246 347",
        "answers of plain PPO 0.66 \u00b1 0.05 0.69 \u00b1 0.05 answers of RLP 0.63 \u00b1 0.06 0.720 \u00b1 0.049",
        "wins of the first position 51.8%",
        "reward, last tenth 1.317 1.522",
        "KL, nats per response 6.21 5.87",
        "samples per second 24.3 24.3 generation, s 41.2 41.2 reward, s 12.6 12.6 training, s 63.9 63.9",
        "weight sync, share of the time 6.4% 6.4%",
        "pairs 101 acceptance rate 50.5% refused: one cluster 16 refused: low confidence 83",
        "length of the chosen, tokens 31.4 length of the rejected, tokens 29.2 gap, tokens +2.2",
        "pairs read by the entailment model 6,021",
        "plain RLHF: everything up to the first PPO 3 min 20 s",
        "RLP in all 6 min 40 s",
        "RLP, times plain RLHF 2.00",
        "Tell a story about fox number 119.",
        "rlp says: the fox <b>ran</b> home.",
        "gamma 0.5",
        "KL is to M1, per response, answers sampled at temperature 0.7;",
        "Win rates compare the expert's scores of single answers. Win rates against the references are the expert's "
        "verdicts on an answer and the reference side by side, asked about in one drawn order; it abstained on 8 of "
        "480, which are left out.",
    ):
        assert expected in page.text
    assert "not run" not in page.text
    assert "not measured" not in page.text
    assert len(page.figures) == 7


def test_the_file_stands_alone_and_is_small(rlp_run_dir):
    page = report(rlp_run_dir)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert (rlp_run_dir / "report.html").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    "missing",
    ["config.json", "timings.json", "ledger.sqlite", "metrics", "stages"]
    + [f"stages/{stage}" for stage in rlp_metrics() if stage != "select"],
)
def test_whatever_is_missing_the_rest_is_shown(rlp_run_dir, missing):
    path = rlp_run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(rlp_run_dir)
    if missing not in ("config.json", "timings.json"):
        assert "not run" in page.text


def test_every_moment_of_a_run_has_a_report(rlp_run_dir):
    """Stages in reverse: what a run looks like after each of them."""
    for stage in reversed(rlp_metrics()):
        shutil.rmtree(rlp_run_dir / "stages" / stage)
        page = report(rlp_run_dir)
    assert "RLP in all not run" in page.text
    assert "Sample answers: not run" in page.text


def test_a_run_without_a_refresh_has_two_policies(rlp_run_dir):
    """PPO on a function or an evaluator."""
    for stage in ("samples", "synthesize", "refit_reward_model", "ppo_refreshed"):
        shutil.rmtree(rlp_run_dir / "stages" / stage)
    table = rlp_run_dir / "stages" / "evaluate" / "table" / "part-00000.parquet"
    pq.write_table(pq.read_table(table).drop_columns(["rlp_response", "rlp_score"]), table)
    evaluated = rlp_metrics()["evaluate"]
    two = {name: evaluated["policies"][name] for name in ("m1", "ppo")}
    edit_metrics(rlp_run_dir, "evaluate", policies=two, reward_accuracy={})
    page = report(rlp_run_dir)
    assert "plain PPO 2.47 \u00b1 0.11 +0.37 \u00b1 0.09" in page.text
    assert "ppo says: the fox <b>ran</b> home." in page.text


def test_a_run_that_accepted_no_pair_says_so(rlp_run_dir):
    none = {"outcomes": {"one_cluster": 200}, "pairs_by_gamma": dict.fromkeys(["0.0", "0.5"], 0)}
    edit_metrics(rlp_run_dir, "synthesize", num_pairs=0, acceptance_rate=0.0, embedding_acceptance_rate=0.31, **none)
    page = report(rlp_run_dir)
    assert "No pair was accepted , of 200 prompts" in page.text
    assert "would accept 31.0% of the prompts" in page.text
    assert "No synthetic pair was accepted" in page.text


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", "Nothing was sampled, paired or refitted"),
        ("none", "second PPO on the old reward model"),
        ("none", "gain in mean expert score, second PPO minus M1"),
        ("ocrm", "Mean weight: 0.950"),
        ("uml", "Multi-view learning on 1,580 samples"),
        ("reward_pairs", "samples by the old reward model is paired with the worst; nothing was clustered"),
        ("self_judged", "samples by the policy's own judgement is paired with the worst; nothing was clustered"),
    ],
)
def test_every_refresh_has_its_words(rlp_run_dir, method, expected):
    edit_config(rlp_run_dir, refresh={"method": method})
    (rlp_run_dir / "stages" / "importance").mkdir()
    manifest = {"seconds": 1.0, "metrics": {"mean_weight": 0.95}, "summary": ""}
    (rlp_run_dir / "stages" / "importance" / "manifest.json").write_text(json.dumps(manifest))
    edit_metrics(rlp_run_dir, "synthesize", confidences={}, pairs_by_gamma={})
    assert expected in report(rlp_run_dir).text


def test_pairs_of_a_file_cost_nothing(rlp_run_dir):
    edit_config(rlp_run_dir, preferences={"source": "data", "data": {"path": "pairs.jsonl"}})
    (rlp_run_dir / "ledger.sqlite").unlink()
    source = {"source": "data", "num_prompts": 250, "num_rows_read": 280, "label": {}}
    edit_metrics(rlp_run_dir, "preferences", **source)
    page = report(rlp_run_dir)
    assert "0 / 0 paid preference queries" in page.text
    assert "preferences (of a file) pairs 274 prompts 250 rows read 280" in page.text


def test_without_a_refresh_nothing_is_called_refreshed(rlp_run_dir):
    edit_config(rlp_run_dir, refresh={"method": "none"})
    for stage in ("samples", "synthesize", "refit_reward_model", "audit_pairs"):
        shutil.rmtree(rlp_run_dir / "stages" / stage)
    page = report(rlp_run_dir)
    assert "held-out pairs r accuracy" in page.text and "both PPOs in all" in page.text
    assert "refreshed" not in page.text.replace("ppo_refreshed", "") and "RLP " not in page.text
    assert "answers of second PPO 0.63 \u00b1 0.06" in page.text


SHARED = (
    "+0.37 \u00b1 0.09 gain in mean expert score, PPO minus M1, n = 120",
    "59.2% \u00b1 4.0 win rate of PPO against M1",
    "PPO 2.47 \u00b1 0.11 +0.37 \u00b1 0.09 59.2% \u00b1 4.0",
    "reward, last tenth 1.317",
    "Tell a story about fox number 119.",
    "ppo says: the fox <b>ran</b> home.",
    "One seed:",
)
OF_REWARD = {
    "evaluator": (
        "control: PPO on an evaluator of actively selected labels",
        "control: random selection",
        "300 / 300 paid label queries",
        "Spearman, held-out judgements (44) 0.60 \u00b1 0.10",
        "answers of PPO 0.70 \u00b1 0.05",
        "everything up to the end of PPO 2 min 47 s",  # the selection counts, where no other stage contains it
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


@pytest.mark.parametrize("reward", OF_REWARD)
def test_ppo_on_another_reward_has_its_report(rlp_run_dir, reward):
    leave_ppo_alone(rlp_run_dir, reward)
    page = report(rlp_run_dir)
    for expected in (*SHARED, *OF_REWARD[reward]):
        assert expected in page.text
    for unknown in ("RLP", "refresh", "plain PPO", "Preferences", "preference queries", "gamma"):
        assert unknown not in page.text
    facts = json.loads((rlp_run_dir / "report.json").read_text())
    assert facts["rlp"]["gain"]["mean"] == 0.37 and facts["rlp"]["titles"] == {"m1": "M1", "ppo": "PPO"}
    expected = ["pool", "sft", "ppo", "evaluate"]
    expected[2:2] = ["generate", "select", "query", "fit_evaluator"] if reward == "evaluator" else []
    assert [stage["stage"] for stage in facts["stages"]] == expected


@pytest.mark.parametrize(
    "missing", ["config.json", "metrics", "stages/ppo", "stages/evaluate/manifest.json", "stages/sft"]
)
@pytest.mark.parametrize("reward", OF_REWARD)
def test_ppo_on_another_reward_has_a_report_at_every_moment(rlp_run_dir, reward, missing):
    path = leave_ppo_alone(rlp_run_dir, reward) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(rlp_run_dir)
    assert "RLP" not in page.text and ("not run" in page.text or missing == "config.json")


@pytest.mark.parametrize(
    ("by", "expected"),
    [("both", "in both orders, a disagreement being a tie;"), ("scores", "this expert compares no answers itself;")],
)
def test_win_rates_against_references_say_what_they_compare(rlp_run_dir, by, expected):
    references = rlp_metrics()["evaluate"]["references"]
    edit_metrics(rlp_run_dir, "evaluate", references=references | {"by": by})
    assert expected in report(rlp_run_dir).text
    edit_metrics(rlp_run_dir, "evaluate", references={})
    text = report(rlp_run_dir).text
    assert "against references" not in text and "the references" not in text
    assert "scores of single answers. KL is" in text


def test_a_policy_that_said_nothing_has_no_kl(rlp_run_dir):
    policies = rlp_metrics()["evaluate"]["policies"]
    policies["rlp"] |= {"kl": None, "perplexity": None, "length": 0.0, "distinct2": 0.0}
    edit_metrics(rlp_run_dir, "evaluate", policies=policies)
    page = report(rlp_run_dir)
    assert "38.9% \u00b1 4.2 not measured - 0.000" in page.text


def test_rounds_of_ppo_on_an_evaluator_have_their_table(rlp_run_dir):
    leave_ppo_alone(rlp_run_dir, "evaluator")
    edit_config(rlp_run_dir, rounds=2)
    page = report(rlp_run_dir)
    assert "evaluator's rank correlation reward of PPO 1 - 0.60 \u00b1 0.10 1.317 2 - not measured -" in page.text
