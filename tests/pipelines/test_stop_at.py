"""A run that stops buying labels early: money is left, and the report says why."""

import os
import sqlite3

from rayrl.config import load_config
from rayrl.pipelines.run_pipeline import run_pipeline
from rayrl.preflight import check
from rayrl.stages.labelling.query import asking, query
from rayrl.stages.policy.sft import sft
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.select import select
from tests.pipelines.test_proxy_dpo import ROOT, SMALL, manifest, rows

BUDGET, STOP_AT = 100, 0.2


def to_the_evaluator(run, services, oracle):
    """`proxy_dpo` as far as labels are bought and learnt from: no policy is trained."""
    m1 = sft(run, services)
    responses = generate(run, services, m1, read_pool(run))
    judgements = query(run, oracle, select(run, services, m1, responses, asking(oracle)))
    return fit_evaluator(run, services, m1, [judgements])


def test_a_run_stops_asking_once_the_labels_are_enough(ray_cluster, tmp_path):
    os.chdir(ROOT)
    overrides = [f"select.budget={BUDGET}", f"select.stop_at={STOP_AT}", "select.batches=4", "sft.enabled=false"]
    overrides += ["select.strategy=uncertainty", "select.first_batch=random", "evaluator.type=head"]
    config = load_config(
        ROOT / "jobs/configs/quickstart.toml", [*SMALL, *overrides, f"run_dir={tmp_path}", "name=stops-early"]
    )
    run_pipeline(config, check(config, cluster={"CPU": 4.0}), to_the_evaluator, ray_start_s=0.0)
    selected, asked = (manifest(tmp_path, stage)["metrics"] for stage in ("select", "query"))
    with sqlite3.connect(f"file:{tmp_path / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        ((num_paid,),) = ledger.execute("select count(*) from attempts where purpose = 'label' and state != 'refunded'")
    assert num_paid == asked["num_spent"] == len(rows(tmp_path, "select")) == BUDGET - selected["num_unspent"]
    assert selected["is_enough"] and 32 <= num_paid < BUDGET, "a meter needs 32 labels"
    assert [batch["num_asked"] for batch in selected["batches"]] == [25] * (num_paid // 25)
    summary = manifest(tmp_path, "select")["summary"]
    assert summary.endswith(f"; {selected['num_unspent']} not asked: select.stop_at is reached")
    page = (tmp_path / "report.html").read_text()
    assert f"not asked, since select.stop_at = {STOP_AT} is reached" in page
