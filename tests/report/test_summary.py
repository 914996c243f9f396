"""The facts of a run, whatever it has reached."""

import asyncio
import contextlib
import json
import math

import fsspec
import pytest

from rayrl.errors import DataError, RunDirectoryError
from rayrl.oracles.ledger import Ledger, Query
from rayrl.oracles.protocol import Verdict
from rayrl.report.stages import STAGES
from rayrl.report.summary import gain, plus_minus, summarize_run
from tests.report.manifests import edit_metrics, estimate


def test_a_good_run_has_no_caveats(run_dir):
    facts = summarize_run(str(run_dir))
    assert facts["caveats"] == []
    assert facts["paid"]["pairs_per_query"] == pytest.approx(1163 / 128)
    assert [stage["state"] for stage in facts["stages"]] == ["done"] * (len(STAGES["proxy_dpo"]) - 1)  # not synthesize
    assert {"what": "engine:generate", "num": 2, "seconds": pytest.approx(34.2)} in facts["startup"]


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("evaluate", {"difference": estimate(0.1, 0.08)}, "not above two standard errors"),
        ("evaluate", {"difference": estimate(0.5, None)}, "no standard error"),
        ("evaluate", {"length_controlled_win_rate": estimate(0.52, 0.05)}, "length may explain it"),
        ("evaluate", {"kl": estimate(40.0, 1.0)}, "KL to M1 is large"),
        ("evaluate", {"distinct2_m2": 0.2}, "distinct-2 went from 0.412"),
        ("evaluate", {"self_bleu_m2": 0.5}, "self-BLEU"),
        ("evaluate", {"length_m2": 90.0}, "Responses got longer"),
        ("evaluate", {"length_m2": 20.0}, "Responses got shorter"),
        ("evaluate", {"perplexity_m2": 50.0}, "M1 finds M2's text unlikely"),
        ("evaluate", {"evaluator_spearman": estimate(0.1, 0.1)}, "on the new policy's responses"),
        ("fit_evaluator", {"validation": {"spearman": estimate(0.2, 0.2)}}, "on held-out judgements"),
        (
            "query",
            {"label": {"spent": 128, "abstained": 60, "lost": 0}},
            "no label to 60 of 128 label queries; 60 were paid",
        ),
        ("query", {"label": {"spent": 128, "abstained": 0, "lost": 3}}, "3 of 128"),
        ("pseudo_label", {"num_pairs": 500}, "Only 3.9 preference pairs"),
        ("generate", {"num_empty": 2000}, "2000 of 4800 responses are empty"),
        ("generate", {"truncated_share": 0.9}, "90% of the responses"),
    ],
)
def test_each_thing_that_looks_wrong_is_said(run_dir, stage, changes, expected):
    edit_metrics(run_dir, stage, **changes)
    (caveat,) = summarize_run(str(run_dir))["caveats"]
    assert expected in caveat


def test_the_ledger_itself_knows_best(run_dir):
    question = {"prompt_id": "p", "response_id": "p-0", "prompt": "x", "oracle": "o", "rubric": "r"}
    with contextlib.closing(Ledger(str(run_dir / "ledger.sqlite"), {"label": 128, "evaluate": 128})) as ledger:
        for i, (purpose, score, billed) in enumerate(
            [("label", 3.0, True), ("label", None, True), ("label", None, False), ("evaluate", 1.0, True)]
        ):
            reserved = ledger.reserve(Query(response=str(i), **question), purpose, 0.01)
            ledger.commit(reserved, Verdict(score=score, rationale="", billed=billed, cost_usd=0.01))
        ledger.reserve(Query(response="open", **question), "label", 0.01)
        expected = ledger.summary()
        paid = summarize_run(str(run_dir))["paid"]  # while its owner has it open
    for purpose in ("label", "evaluate"):
        assert {name: paid[purpose].get(name, 0) for name in expected[purpose]} == pytest.approx(expected[purpose])


def test_a_remote_runs_ledger_is_read_as_of_its_last_upload(run_dir):
    memory = fsspec.filesystem("memory")
    memory.put(str(run_dir), "/test_summary", recursive=True)
    question = {"prompt_id": "p", "response_id": "p-0", "prompt": "x", "response": "y", "oracle": "o", "rubric": "r"}
    with contextlib.closing(Ledger("memory://test_summary/ledger.sqlite", {"label": 128})) as ledger:
        reserved = ledger.reserve(Query(**question), "label", 0.01)
        ledger.commit(reserved, Verdict(score=3.0, rationale="", billed=True, cost_usd=0.01))
        asyncio.run(ledger.sync())
        paid = summarize_run("memory://test_summary")["paid"]["label"]
    memory.rm("/test_summary", recursive=True)
    assert (paid["spent"], paid["scored"], paid["cost_usd"]) == (1, 1, 0.01)


def test_a_damaged_ledger_leaves_the_manifests_counts(run_dir, caplog):
    (run_dir / "ledger.sqlite").write_bytes(b"no database" * 100)
    assert summarize_run(str(run_dir))["paid"]["label"]["spent"] == 128
    assert "cannot be read" in caplog.text


def test_the_evaluation_ledger_is_the_latest_count(run_dir):
    edit_metrics(run_dir, "evaluate", ledger={"evaluate": {"budget": 128, "spent": 126, "lost": 2}})
    assert summarize_run(str(run_dir))["paid"]["evaluate"]["spent"] == 126


@pytest.mark.parametrize(
    ("section", "value", "expected"),
    [
        ("labels", "shuffled", "the floor"),
        ("labels", "expert", "the ceiling"),
        ("labels", "direct", "the paid judgements alone"),
        ("select", {"strategy": "random"}, "random selection"),
        ("generate", {"source": "seed"}, "off-policy"),
    ],
)
def test_controls_are_named(run_dir, section, value, expected):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {section: value}))
    (control,) = summarize_run(str(run_dir))["control"]
    assert expected in control


def test_a_run_that_just_began(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "young", "select": {"budget": 8}}')
    table = tmp_path / "stages" / "generate" / "table"
    table.mkdir(parents=True)
    (table / "part-00000.parquet").touch()
    facts = summarize_run(str(tmp_path))
    states = {stage["stage"]: (stage["state"], stage["summary"]) for stage in facts["stages"]}
    assert states["sft"] == ("not run", None)
    assert states["generate"] == ("started", "1 blocks done")
    assert facts["paid"]["label"] == {"budget": 8}
    assert gain(facts) is None


def test_not_a_number_becomes_null(run_dir):
    edit_metrics(run_dir, "dpo", final_loss=math.nan)
    assert summarize_run(str(run_dir))["metrics"]["dpo"]["final_loss"] is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="must be the folder of a run"):
        summarize_run(str(tmp_path / "nowhere"))


def test_a_damaged_manifest_is_named(run_dir):
    (run_dir / "stages" / "sft" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"stages/sft/manifest\.json must be JSON"):
        summarize_run(str(run_dir))


def test_no_mean_without_its_standard_error():
    assert plus_minus(estimate(0.5, 0.1), signed=True) == "+0.50 \u00b1 0.10"
    assert plus_minus(estimate(0.5, 0.01)) == "0.500 \u00b1 0.010"
    assert plus_minus(estimate(0.66, 0.05), percent=True) == "66.0% \u00b1 5.0"
    assert plus_minus(estimate(0.5, None)) == "no standard error"
    assert plus_minus(None) == "not measured"
