"""How far the stage under way is, from what it leaves in the run directory."""

import contextlib
import json
import os

import fsspec
import pytest

from rayrl.cli import going
from rayrl.oracles.ledger import Ledger, Query
from rayrl.oracles.protocol import Verdict
from rayrl.report.pace import WINDOW, paced
from rayrl.report.summary import summarize_run
from rayrl.runs import storage

NOON = 1_700_000_000.0
CONFIG = {
    "name": "young",
    "generate": {"block_size": 64},
    "select": {"budget": 8},
    "dpo": {"batch_size": 16},
    "pseudo_label": {"synthetic": True},
}


@pytest.fixture
def run(tmp_path):
    """A run that has read its pool: ten blocks, and one held out."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pool = {"metrics": {"train_blocks": 10, "held_out_blocks": 1}}
    storage.write_json(f"{tmp_path}/stages/pool/manifest.json", pool)
    return tmp_path


def write_parts(run, table, times):
    for block, at in enumerate(times):
        part = run / "stages" / table / f"part-{block:05d}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        os.utime(part, (at, at))


def write_curve(run, name, times, *, num_steps=None):
    rows = [{"step": step, "at": at, "loss": 1.0} for step, at in enumerate(times, 1)]
    (run / "metrics").mkdir(exist_ok=True)
    (run / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "stages" / name).mkdir(parents=True, exist_ok=True)
    if num_steps is not None:
        (run / "metrics" / f"{name}.json").write_text(json.dumps({"num_steps": num_steps}))


def pace_of(run, stage):
    return next(one["pace"] for one in summarize_run(str(run))["stages"] if one["stage"] == stage)


def test_a_table_goes_as_its_last_blocks_came(run):
    write_parts(run, "generate/table", [NOON, NOON + 20, NOON + 40, NOON + 60])
    assert pace_of(run, "generate") == {
        "done": 4,
        "total": 10,
        "unit": "blocks",
        "items": "prompts",
        "per_s": pytest.approx(3.2),
        "eta_s": pytest.approx(120.0),
        "at": NOON + 60,
    }
    assert pace_of(run, "dpo") is None


def test_of_several_tables_the_one_that_is_written_counts(run):
    write_parts(run, "pseudo_label/scored-v", [NOON + second for second in range(10)])
    write_parts(run, "pseudo_label/table", [NOON + 10, NOON + 12])
    pace = pace_of(run, "pseudo_label")
    assert (pace["done"], pace["total"], pace["per_s"]) == (2, 20, pytest.approx(32.0))  # and the synthetic pairs
    write_parts(run, "evaluate/m1-v", [NOON])
    pace = pace_of(run, "evaluate")
    assert (pace["done"], pace["total"], pace["per_s"], pace["eta_s"]) == (1, 1, None, None)


def test_a_training_goes_as_its_last_steps_came(run):
    write_curve(run, "dpo", [NOON, NOON + 2, NOON + 4], num_steps=33)
    pace = pace_of(run, "dpo")
    assert (pace["done"], pace["total"], pace["unit"], pace["items"]) == (3, 33, "steps", "pairs")
    assert (pace["per_s"], pace["eta_s"]) == (pytest.approx(8.0), pytest.approx(60.0))
    write_curve(run, "sft", [NOON, NOON + 2])  # of a run of before totals were kept
    assert (pace_of(run, "sft")["total"], pace_of(run, "sft")["eta_s"]) == (None, None)


def test_paid_queries_go_as_the_ledger_says(run):
    (run / "stages" / "query").mkdir()
    question = {"prompt_id": "p", "response_id": "p-0", "prompt": "x", "oracle": "o", "rubric": "r"}
    with contextlib.closing(Ledger(str(run / "ledger.sqlite"), {"label": 8})) as ledger:
        for i in range(3):
            reserved = ledger.reserve(Query(response=str(i), **question), "label", 0.01)
            ledger.commit(reserved, Verdict(score=1.0, rationale="", billed=True, cost_usd=0.01))
        ledger.reserve(Query(response="open", **question), "label", 0.01)
    pace = pace_of(run, "query")
    assert (pace["done"], pace["total"], pace["unit"]) == (3, 8, "queries")


def test_a_remote_run_has_a_pace_too(run):
    write_parts(run, "generate/table", [NOON, NOON + 20])
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/test_pace", recursive=True)
    pace = next(one["pace"] for one in summarize_run("memory://test_pace")["stages"] if one["stage"] == "generate")
    memory.rm("/test_pace", recursive=True)
    assert (pace["done"], pace["total"]) == (2, 10) and pace["at"] > NOON


def test_only_the_last_ones_count():
    slow_start = [NOON, *(NOON + 3600 + second for second in range(WINDOW))]
    pace = paced(slow_start, 33, 43, "steps", "rows", 2)
    assert pace is not None and (pace["per_s"], pace["eta_s"]) == (pytest.approx(2.0), pytest.approx(10.0))
    assert paced([], 0, 10, "steps", "rows", 2) is None
    at_once = paced([NOON, NOON], 2, 1, "blocks", "prompts", None)
    assert at_once is not None and (at_once["total"], at_once["per_s"], at_once["eta_s"]) == (None, None, None)


def test_a_pace_for_humans():
    pace = {"done": 1200, "total": 4000, "unit": "blocks", "items": "prompts", "per_s": 31.23, "eta_s": 4321.0}
    assert going(pace | {"at": NOON}, NOON + 95) == (
        "1,200 of 4,000 blocks, 31.2 prompts/s, ETA 1 h 12 min; last sign 1 min 35 s ago"
    )
    unknown = dict.fromkeys(("total", "per_s", "eta_s"))
    assert going(pace | unknown | {"at": NOON}, NOON) == "1,200 blocks, - prompts/s, ETA -; last sign 0 s ago"
