"""A pipeline from its config to its report: opens the run, starts its control and oracle pool, and leaves no actor."""

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import ray
import ray.data
from ray.actor import ActorHandle

from rayrl.config import RunConfig
from rayrl.errors import WaitingForPeople
from rayrl.fleets.control import Driver, start_control
from rayrl.fleets.services import Services
from rayrl.metrics import meters, prometheus
from rayrl.metrics.tracking import tracked
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.people.waiting import Waiting
from rayrl.oracles.pool import end_oracle_pool, start_oracle_pool, stop_asking
from rayrl.pipelines.stopping import STOP_REQUEST, Stopping
from rayrl.preflight.plan import Plan
from rayrl.report.page import write_report
from rayrl.report.paid import answers
from rayrl.runs import storage
from rayrl.runs.run import Manifest, Run, ledger_url, note_cluster, note_waiting, open_run
from rayrl.runs.stage_metrics import EvaluateMetrics
from rayrl.stages.labelling.ask import COUNT_TIMEOUT_S, wait_for
from rayrl.stages.labelling.try_out import try_out

logger = logging.getLogger(__name__)

Pipeline = Callable[[Run, Services, ActorHandle], Manifest[EvaluateMetrics]]

NOISY_LOGGERS = ("ray.data", "ray.train", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run that is going on, with the fleets and the oracle that its stages ask."""

    run: Run
    services: Services
    oracle: ActorHandle


def run_pipeline(
    config: RunConfig, plan: Plan, pipeline: Pipeline, *, ray_start_s: float, stopping: Stopping | None = None
) -> str:
    """Run a pipeline to its report; returns the report's URL.

    Args:
        config: the run.
        plan: the preflight's: resource mode, source of the reference, and the ledger's caps.
        pipeline: `proxy_dpo` or `rlp`.
        ray_start_s: seconds that connecting to Ray took, for the report's table of start-up times.
        stopping: this process's handlers of signals, the first of which stops the asking before anything else; None in
            a process that no signal is to stop.
    """
    with running(config, plan, ray_start_s=ray_start_s, stopping=stopping) as each:
        pipeline(each.run, each.services, each.oracle)
        each.services.release()
    facts = write_report(each.run.url)
    for line in answers(facts.paid):
        logger.info(line)
    return storage.join(each.run.url, "report.html")


@contextmanager
def running(
    config: RunConfig, plan: Plan, *, ray_start_s: float = 0.0, stopping: Stopping | None = None
) -> Generator[Running]:
    """Open a run, start its control and its oracle pool, and ask the test question; end all of them, and its fleets.

    The arguments are those of `run_pipeline`.
    """
    # The stages draw progress bars of their own.
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    run = open_run(config)
    note_waiting(run.url, None)
    note_cluster(run.url, ray.get_runtime_context().gcs_address)
    run.record_time("ray", ray_start_s)
    prometheus.name_run(config.name)
    with ExitStack() as ends:
        meters.RUN.set(1)
        ends.callback(meters.RUN.forget)
        control = start_control(config.name, evaluators=evaluators_role(config))
        # Registered first, so it ends last: a run counts as alive for as long as its control is.
        ends.callback(ray.kill, control)
        driver = Driver(control)
        if stopping is not None:
            interrupt_when_stopped(driver)
        oracle = start_oracle_pool(
            config.name,
            config.oracle,
            rubric=load_rubric(config.rubric),
            ledger=ledger_url(run.url, config),
            budgets=plan.budgets,
            run=run.id,
        )
        ends.callback(end_oracle_pool, oracle)
        if stopping is not None:
            ends.enter_context(stopping.first(partial(stop_asking, oracle)))
        driver.show("oracle", "oracle", oracle)
        try_out(run, oracle, plan.test_prompts)
        services = Services(
            run, mode=plan.mode, reference=plan.reference, on_gpu=plan.on_gpu, dtype=plan.dtype, control=driver
        )
        ends.callback(services.stop)
        ends.enter_context(tracked(run))
        try:
            yield Running(run=run, services=services, oracle=oracle)
        except WaitingForPeople:
            waiting: Waiting | None = wait_for(
                oracle.waiting.remote(), "what people have not answered", COUNT_TIMEOUT_S
            )
            if waiting is not None:  # a pool that was started again a moment ago knows of nothing yet
                note_waiting(run.url, asdict(waiting))
            raise


def evaluators_role(config: RunConfig) -> str:
    """Return the fleets that `rayrl scale evaluators=N` means: those that serve the evaluator or the reward models."""
    if config.pipeline == "rlp":
        return "embedders" if config.rewards_by_embedders else "generators"
    return config.evaluator.served_by


def interrupt_when_stopped(driver: Driver) -> None:
    """Send this process the signal that stops it (`rayrl.pipelines.stopping`) once an operator ends the run."""
    main = threading.main_thread()

    def wait() -> None:
        if driver.follow():
            signal.pthread_kill(main.ident or 0, STOP_REQUEST)

    threading.Thread(target=wait, name="stop", daemon=True).start()
