"""The report: everything it must show, whatever is missing, and nothing a model wrote may act."""

import json
import shutil

import fsspec
import pytest

from rayrl.errors import RunDirectoryError
from rayrl.report.page import write_report
from rayrl.report.stages import STAGES
from tests.report.page import Page


def report(run_dir):
    facts = write_report(str(run_dir))
    assert json.loads((run_dir / "report.json").read_text()) == facts
    return Page((run_dir / "report.html").read_text())


def test_a_finished_run_shows_everything(run_dir):
    page = report(run_dir)
    for expected in (
        "made-up-run",
        "seed 3",
        "the method itself, no control",
        "+0.45 \u00b1 0.11",
        "66.0% \u00b1 5.0",
        "63.0% \u00b1 5.5",
        "128 / 128",
        "9.1 preference pairs per paid query",
        "cost, USD 0.41",
        "abstained (no label) 4",
        "responses pseudo-labelled by the evaluator 4,672",
        "length, tokens 46.8 51.3",
        "perplexity under M1 4.90 5.60",
        "distinct-2 (higher is more diverse) 0.412 0.398",
        "self-BLEU (lower is more diverse) 0.231 0.252",
        "KL(M2 || M1), nats per response 4.20 \u00b1 0.30",
        "Spearman, held-out judgements (19) 0.61 \u00b1 0.14",
        "Spearman, M2's responses (64) 0.55 \u00b1 0.11",
        "engine:generate 2 34.2",
        "small fox and its friend number 63",
    ):
        assert expected in page.text
    assert "not run" not in page.text
    assert len(page.figures) == 6


def test_the_file_stands_alone_and_is_small(run_dir):
    page = report(run_dir)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert (run_dir / "report.html").stat().st_size < 1_000_000


def test_model_output_is_text_and_nothing_else(run_dir):
    page = report(run_dir)
    assert "script" not in page.tags
    assert "<script>alert('x')</script> & <img src=http://evil.example/a onerror=alert(1)> {{ 7*7 }}" in page.text
    assert "\u202e" not in page.text
    assert "default-src 'none'" in (run_dir / "report.html").read_text()


def test_a_gain_without_standard_error_is_not_shown(run_dir):
    path = run_dir / "stages" / "evaluate" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["difference"]["standard_error"] = None
    path.write_text(json.dumps(manifest))
    page = report(run_dir)
    assert "+0.45" not in page.text
    assert "Before you believe these numbers" in page.text


@pytest.mark.parametrize(
    "missing",
    ["config.json", "timings.json", "metrics", "stages"]
    + [f"stages/{stage}" for stage in STAGES["proxy_dpo"] if stage != "synthesize"],
)
def test_whatever_is_missing_the_rest_is_shown(run_dir, missing):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(run_dir)
    if missing not in ("config.json", "timings.json"):
        assert "not run" in page.text


def test_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "young", "seed": 0}')
    page = report(tmp_path)
    assert "Evaluator calibration: not run" in page.text
    assert "Sample answers: not run" in page.text
    assert page.figures == []


def test_optional_benchmarks_and_references_are_shown_when_there(run_dir):
    path = run_dir / "stages" / "evaluate" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= {
        "lm_eval": {"mmlu": {"acc,none": 0.2512}},
        "references": {
            "by": "scores",
            "num_prompts": 64,
            "policies": {
                "m1": {"win_rate": {"mean": 0.3, "standard_error": 0.05, "num": 64}, "num_abstained": 0},
                "m2": {"win_rate": {"mean": 0.4, "standard_error": 0.05, "num": 64}, "num_abstained": 0},
            },
        },
    }
    path.write_text(json.dumps(manifest))
    page = report(run_dir)
    assert "mmlu acc,none 0.2512" in page.text
    assert "win rate against the references, by scores 30.0% \u00b1 5.0 40.0% \u00b1 5.0" in page.text
    assert "references compare scores: this expert compares no answers itself; it abstained on 0 of 128" in page.text


def test_a_remote_run_directory(run_dir):
    memory = fsspec.filesystem("memory")
    memory.put(str(run_dir), "/test_report", recursive=True)
    try:
        assert write_report("memory://test_report")["paid"]["num_pairs"] == 1163
        assert b"+0.45" in memory.cat_file("/test_report/report.html")
    finally:
        memory.rm("/test_report", recursive=True)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="must be the folder of a run"):
        write_report(str(tmp_path))
