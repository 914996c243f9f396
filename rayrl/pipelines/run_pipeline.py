"""Around a pipeline: open the run, start its control and oracle pool, and whatever happens leave no actor behind."""

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack

import ray
import ray.data
from ray.actor import ActorHandle

from rayrl.config import RunConfig
from rayrl.fleets.control import Driver, start_control
from rayrl.fleets.services import Services
from rayrl.metrics import meters, prometheus
from rayrl.metrics.tracking import tracked
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import start_oracle_pool
from rayrl.preflight.plan import Plan
from rayrl.report.page import write_report
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run, open_run

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
    scalar = config.rewards_by_embedders if config.pipeline == "rlp" else config.evaluator.type == "scalar"
    budgets = {"label": plan.num_label_queries, "evaluate": config.evaluate.budget + config.evaluate.diagnosis_budget}
    with ExitStack() as ends:
        meters.RUN.set(1)
        ends.callback(meters.RUN.forget)
        control = start_control(config.name, evaluators="embedders" if scalar else "generators")
        ends.callback(ray.kill, control)  # last: a run is alive as long as its control is
        driver = Driver(control)
        interrupt_when_stopped(driver)
        oracle = start_oracle_pool(
            config.name,
            config.oracle,
            rubric=load_rubric(config.rubric),
            ledger=storage.join(run.url, "ledger.sqlite"),
            budgets=budgets,
        )
        ends.callback(ray.kill, oracle)
        driver.show("oracle", "oracle", oracle)
        services = Services(run, mode=plan.mode, reference=plan.reference, on_gpu=plan.on_gpu, control=driver)
        ends.callback(services.stop)
        ends.enter_context(tracked(run))
        pipeline(run, services, oracle)
        services.release()
    write_report(run.url)
    return storage.join(run.url, "report.html")


def interrupt_when_stopped(driver: Driver) -> None:
    """Raise KeyboardInterrupt once an operator ends the run, if this is the main thread, which alone may be told.

    By SIGUSR1: what Ray Train does on SIGINT ends the process with exit code 0, as if the run had finished.
    """
    main = threading.current_thread()
    if main is not threading.main_thread():
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def wait() -> None:
        if driver.follow():
            signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, interrupt)
    threading.Thread(target=wait, name="stop", daemon=True).start()
