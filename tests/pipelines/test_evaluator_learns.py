"""The generative evaluator learns from paid judgements: it ranks held-out ones far better than on shuffled labels."""

import math
import os

import pytest

from rayrl.config import load_config
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import start_oracle_pool
from rayrl.runs.run import open_run
from rayrl.runs.stage_table import FIT_EVALUATOR
from rayrl.stages.labelling.query import query
from rayrl.stages.policy.sft import base_policy
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.select import select
from tests.conftest import ROOT


def validation(folder, labels):
    """Held-out validation of an evaluator trained on 120 of 240 random judgements."""
    import ray

    overrides = ["sft.enabled=false", "pool.limit=68", "pool.num_eval=8", "select.strategy=random"]
    overrides += ["select.budget=240", "evaluator.holdout=0.5", f"labels={labels}", f"name=learns-{labels}"]
    config = load_config(ROOT / "jobs/configs/quickstart.toml", [*overrides, f"run_dir={folder / labels}"])
    run = open_run(config)
    services = Services(run, mode="overlap", reference="generation")
    oracle = start_oracle_pool(
        config.name,
        config.oracle,
        rubric=load_rubric(config.rubric),
        ledger=f"{run.url}/ledger.sqlite",
        budgets={"label": 240, "evaluate": 0},
    )
    try:
        m1 = base_policy(run)
        responses = generate(run, services, m1, read_pool(run))
        judgements = query(run, oracle, select(run, services, m1, responses))
        fit_evaluator(run, services, m1, [judgements])
    finally:
        services.stop()
        ray.kill(oracle)
    manifest = run.manifest(FIT_EVALUATOR)
    assert manifest is not None
    return manifest.metrics.validation


@pytest.mark.slow
def test_held_out_rank_correlation_is_above_shuffled_labels(ray_cluster, tmp_path):
    os.chdir(ROOT)
    true, shuffled = validation(tmp_path, "proxy"), validation(tmp_path, "shuffled")
    assert true.num > 90
    above = true.spearman.mean - shuffled.spearman.mean
    error = math.hypot(true.spearman.standard_error, shuffled.spearman.standard_error)
    assert above > 2 * error
    assert true.spearman.mean > 0.3
    assert shuffled.spearman.mean == pytest.approx(0, abs=4 * shuffled.spearman.standard_error)
