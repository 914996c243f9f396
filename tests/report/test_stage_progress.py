"""Progress of the stage under way, from what it leaves in the run directory."""

import contextlib
import json
import os
import sqlite3
from dataclasses import asdict, replace
from datetime import datetime

import fsspec
import pytest

from rayrl.cli import going
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from rayrl.report.stage_progress import WINDOW, Progress, measure
from rayrl.report.summary import summarize_run
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    DPO,
    EVALUATE,
    FIT_REWARD_MODEL,
    GENERATE,
    POOL,
    PSEUDO_LABEL,
    QUERY,
    SAMPLES,
    SFT,
    TRACK_REWARDS,
)
from tests.report.made_up_runs import (
    FINISHED_AT,
    PROXY_DPO,
    RLP,
    edit_config,
    judgement,
    merged,
    pool_metrics,
    proxy_dpo_metrics,
    rlp_metrics,
    write_config,
    write_manifest,
)

NOON = 1_700_000_000.0
YOUNG = {
    "name": "young",
    "generate": {"block_size": 64},
    "select": {"budget": 8},
    "dpo": {"batch_size": 16},
    "pseudo_label": {"synthetic": True},
}


@pytest.fixture
def run(tmp_path):
    """A run that has read its pool: ten blocks, and one held out."""
    write_config(tmp_path, merged(PROXY_DPO, YOUNG))
    write_manifest(tmp_path, POOL, pool_metrics(640, 64))
    return tmp_path


def write_parts(run, stage, table, times):
    for block, at in enumerate(times):
        part = run / "stages" / stage.name / table / f"part-{block:05d}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        os.utime(part, (at, at))


def write_curve(run, stage, times, *, num_steps=None):
    rows = [{"step": step, "at": at, "loss": 1.0} for step, at in enumerate(times, 1)]
    (run / "metrics").mkdir(exist_ok=True)
    (run / "metrics" / f"{stage.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "stages" / stage.name).mkdir(parents=True, exist_ok=True)
    if num_steps is not None:
        (run / "metrics" / f"{stage.name}.json").write_text(json.dumps({"num_steps": num_steps}))


def progress_of(run, stage):
    return next(facts.progress for facts in summarize_run(str(run)).stages if facts.stage == stage.name)


def test_a_table_goes_as_its_last_blocks_came(run):
    write_parts(run, GENERATE, "table", [NOON, NOON + 20, NOON + 40, NOON + 60])
    assert asdict(progress_of(run, GENERATE)) == {
        "done": 4,
        "total": 10,
        "unit": "blocks",
        "items": "prompts",
        "per_s": pytest.approx(3.2),
        "eta_s": pytest.approx(120.0),
        "at": NOON + 60,
    }
    assert progress_of(run, DPO) is None


def test_of_several_tables_the_one_that_is_written_counts(run):
    write_parts(run, PSEUDO_LABEL, "scored-v", [NOON + second for second in range(10)])
    write_parts(run, PSEUDO_LABEL, "table", [NOON + 10, NOON + 12])
    progress = progress_of(run, PSEUDO_LABEL)
    assert (progress.done, progress.total, progress.per_s) == (2, 20, pytest.approx(32.0))  # and the synthetic pairs
    write_parts(run, EVALUATE, "m1-v", [NOON])
    progress = progress_of(run, EVALUATE)
    assert (progress.done, progress.total, progress.per_s, progress.eta_s) == (1, 1, None, None)


@pytest.mark.parametrize(("num_prompts", "num_blocks"), [(None, 10), (100, 2), (10_000, 10)])
def test_samples_of_a_part_of_the_pool_take_its_first_blocks(tmp_path, num_prompts, num_blocks):
    write_config(tmp_path, merged(RLP, {"refresh": {"num_prompts": num_prompts}}))
    write_manifest(tmp_path, POOL, pool_metrics(640, 64))
    write_parts(tmp_path, SAMPLES, "table", [NOON])
    assert progress_of(tmp_path, SAMPLES).total == num_blocks


def test_a_training_goes_as_its_last_steps_came(run):
    write_curve(run, DPO, [NOON, NOON + 2, NOON + 4], num_steps=33)
    progress = progress_of(run, DPO)
    assert (progress.done, progress.total, progress.unit, progress.items) == (3, 33, "steps", "pairs")
    assert (progress.per_s, progress.eta_s) == (pytest.approx(8.0), pytest.approx(60.0))
    write_curve(run, SFT, [NOON, NOON + 2])  # its length is not announced yet
    progress = progress_of(run, SFT)
    assert (progress.total, progress.eta_s) == (None, None)


def test_an_ensemble_is_at_the_last_member_that_has_begun(tmp_path):
    write_config(tmp_path, merged(RLP, {"reward_model": {"num_members": 3, "batch_size": 4}}))
    write_curve(tmp_path, FIT_REWARD_MODEL.member(0), [NOON + n for n in range(9)], num_steps=9)
    write_curve(tmp_path, FIT_REWARD_MODEL.member(1), [NOON + 20, NOON + 22], num_steps=9)
    progress = progress_of(tmp_path, FIT_REWARD_MODEL)
    assert (progress.done, progress.total, progress.per_s) == (2, 9, pytest.approx(2.0))


def test_paid_queries_go_as_the_ledger_says(run):
    (run / "stages" / QUERY.name).mkdir()
    with contextlib.closing(Ledger(str(run / "ledger.sqlite"), {"label": 8})) as ledger:
        for i in range(3):
            reserved = ledger.reserve(judgement(str(i)), 0.01)
            ledger.commit(reserved, Verdict(score=1.0, rationale="", billed=True, cost_usd=0.01))
        ledger.reserve(judgement("open"), 0.01)
    progress = progress_of(run, QUERY)
    assert (progress.done, progress.total, progress.unit) == (3, 8, "queries")


def pay(run, purpose, *times):
    """Ask a query of this purpose at each of these Unix times."""
    path = run / "ledger.sqlite"
    with contextlib.closing(Ledger(str(path), {"label": 99, "evaluate": 99})) as ledger:
        for at in times:
            reserved = ledger.reserve(judgement(f"{purpose} {at}", purpose), 0.01)
            ledger.commit(reserved, Verdict(score=1.0, rationale="", billed=True, cost_usd=0.01))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for at in times:
            sql = "UPDATE attempts SET reserved_at = datetime(?, 'unixepoch') WHERE response = ?"
            db.execute(sql, (at, f"{purpose} {at}"))


def begin(run, stage, number=1):
    folder = run if number == 1 else run / "rounds" / str(number)
    (folder / "stages" / stage.name).mkdir(parents=True)


def test_queries_of_finished_stages_are_not_those_of_the_stage_under_way(tmp_path):
    made_up = rlp_metrics()
    write_config(tmp_path, RLP)
    ended = datetime.fromisoformat(FINISHED_AT).timestamp()
    pay(tmp_path, "label", *(ended + second for second in range(7)))
    pay(tmp_path, "evaluate", ended - 30, ended - 20, ended - 10)
    begin(tmp_path, TRACK_REWARDS)
    assert progress_of(tmp_path, TRACK_REWARDS).done == 3
    write_manifest(tmp_path, TRACK_REWARDS, made_up[TRACK_REWARDS])
    begin(tmp_path, AUDIT_PAIRS)
    assert progress_of(tmp_path, AUDIT_PAIRS) is None
    pay(tmp_path, "evaluate", ended, ended + 10)
    progress = progress_of(tmp_path, AUDIT_PAIRS)
    assert (progress.done, progress.total, progress.per_s) == (2, None, pytest.approx(0.1))


def test_queries_of_earlier_rounds_are_not_those_of_a_later_one(run):
    edit_config(run, rounds=2)
    ended = datetime.fromisoformat(FINISHED_AT).timestamp()
    pay(run, "label", ended - 30, ended - 20, ended + 10)
    write_manifest(run, QUERY, proxy_dpo_metrics()[QUERY])
    begin(run, QUERY, 2)
    stages = {facts.stage: facts.progress for facts in summarize_run(str(run)).stages}
    progress = stages["query, round 2"]
    assert progress is not None and (progress.done, progress.total) == (1, None)


def test_the_control_that_asks_about_everything_has_no_known_end(run):
    edit_config(run, labels="expert", pseudo_label={"synthetic": False})
    begin(run, QUERY)
    pay(run, "label", NOON, NOON + 1)
    progress = progress_of(run, QUERY)
    assert (progress.done, progress.total, progress.eta_s) == (2, None, None)


def test_a_remote_run_has_a_pace_too(run):
    write_parts(run, GENERATE, "table", [NOON, NOON + 20])
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/test_pace", recursive=True)
    progress = progress_of("memory://test_pace", GENERATE)
    memory.rm("/test_pace", recursive=True)
    assert (progress.done, progress.total) == (2, 10) and progress.at > NOON


def test_only_the_last_ones_count():
    slow_start = [NOON, *(NOON + 3600 + second for second in range(WINDOW))]
    steps = {"unit": "steps", "items": "rows", "per_unit": 2}
    progress = measure(slow_start, done=33, total=43, **steps)
    assert progress is not None and (progress.per_s, progress.eta_s) == (pytest.approx(2.0), pytest.approx(10.0))
    assert measure([], done=0, total=10, **steps) is None
    at_once = measure([NOON, NOON], done=2, total=1, unit="blocks", items="prompts", per_unit=None)
    assert at_once is not None and (at_once.total, at_once.per_s, at_once.eta_s) == (None, None, None)


def test_progress_for_humans():
    progress = Progress(done=1200, total=4000, unit="blocks", items="prompts", per_s=31.23, eta_s=4321.0, at=NOON)
    assert going(progress, NOON + 95) == (
        "1,200 of 4,000 blocks, 31.2 prompts/s, ETA 1 h 12 min; last sign 1 min 35 s ago"
    )
    unknown = replace(progress, total=None, per_s=None, eta_s=None)
    assert going(unknown, NOON) == "1,200 blocks, - prompts/s, ETA -; last sign 0.0 s ago"
