"""Around a pipeline: open the run, start the oracle pool, and whatever happens leave no actor behind."""

import logging
from collections.abc import Callable

import ray
import ray.data
from ray.actor import ActorHandle

from rayrl.actors.oracle_pool import start_oracle_pool
from rayrl.actors.services import Services
from rayrl.config import RunConfig
from rayrl.models.judge import load_rubric
from rayrl.preflight.plan import Plan
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run, open_run
from rayrl.telemetry import meters, prometheus
from rayrl.telemetry.report import write_report
from rayrl.telemetry.tracking import tracked

logger = logging.getLogger(__name__)

Pipeline = Callable[[Run, Services, ActorHandle], Manifest]


def run_pipeline(config: RunConfig, plan: Plan, pipeline: Pipeline, *, ray_start_s: float) -> str:
    """Run a pipeline to its report; returns the report's URL."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # the stages draw their own
    for noisy in ("ray.data", "ray.train", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run = open_run(config)
    run.record_time("ray", ray_start_s)
    prometheus.name_run(config.name)
    meters.RUN.set(1)
    services = Services(run, mode=plan.mode, reference=plan.reference)
    budgets = {"label": plan.num_label_queries, "evaluate": config.evaluate.budget + config.evaluate.diagnosis_budget}
    oracle = start_oracle_pool(
        config.name,
        config.oracle,
        rubric=load_rubric(config.rubric),
        ledger=storage.join(run.url, "ledger.sqlite"),
        budgets=budgets,
    )
    try:
        with tracked(run):
            pipeline(run, services, oracle)
        services.release()
    finally:
        services.stop()
        ray.kill(oracle)
        meters.RUN.forget()
    write_report(run.url)
    return storage.join(run.url, "report.html")
