"""Command line of the entry points in jobs/: plan, or run to the report. Exit code 2 for a user's mistake."""

import importlib
import logging
import os
import signal
import sys
import time

from rayrl.config import RunConfig, load_config
from rayrl.errors import ConfigError, RayRLError
from rayrl.pipelines.stopping import MESSAGE, Stopping, stoppable
from rayrl.runs.guard import ending_descendants, guard_this_process

USAGE = "usage: python jobs/{name}.py CONFIG.toml [section.key=value ...] [--plan]"


def main(name: str, arguments: list[str], about: str | None) -> int:
    """Run the pipeline `name`, or with --plan only say what it would do.

    Args:
        name: module and function in rayrl/pipelines, and the config's `pipeline`.
        arguments: the command line's.
        about: first lines of --help.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{about}\n{USAGE.format(name=name)}")
        return 0
    with stoppable() as stopping:
        try:
            return _plan_or_run(name, arguments, stopping)
        except BaseException as error:
            # What a library raises because it was interrupted counts as the interruption.
            if stopping.exit_code is not None:
                print(MESSAGE, file=sys.stderr, flush=True)
                disconnect()
                # An ordinary exit joins threads, some of which wait for answers of the cluster that has ended.
                sys.stdout.flush()
                os._exit(stopping.exit_code)
            if isinstance(error, RayRLError):
                print(f"error: {error}", file=sys.stderr)
                return 2
            raise


def _plan_or_run(name: str, arguments: list[str], stopping: Stopping) -> int:
    config = load_config(arguments[0], [argument for argument in arguments[1:] if argument != "--plan"])
    if config.pipeline != name:
        raise ConfigError(
            f'pipeline must be "{name}" for jobs/{name}.py, got "{config.pipeline}"; '
            f"run jobs/{config.pipeline}.py, or change it"
        )
    return plan(config) if "--plan" in arguments else run(config, stopping)


def plan(config: RunConfig) -> int:
    """Print the resolved config, the stages, what they need and what they cost; start nothing."""
    from rayrl.preflight import check, render_plan

    print(config.model_dump_json(indent=2))
    print(render_plan(check(config)))
    return 0


def run(config: RunConfig, stopping: Stopping) -> int:
    """Check everything, connect to the cluster (`rayrl.fleets.connection`), and run to the report."""
    from rayrl.fleets.connection import connect
    from rayrl.pipelines.run_pipeline import run_pipeline
    from rayrl.preflight import check

    plan = check(config, contact_oracle=True)
    started = time.monotonic()
    # Before Ray starts anything that it would have to end.
    guard_this_process()
    try:
        connect()
    except SystemExit as error:  # what Ray's own handler raises until `install` replaces it
        if error.code != signal.SIGTERM:
            raise
        stopping.stop(signal.SIGTERM)
    stopping.install()
    pipeline = getattr(importlib.import_module(f"rayrl.pipelines.{config.pipeline}"), config.pipeline)
    report = run_pipeline(config, plan, pipeline, ray_start_s=time.monotonic() - started, stopping=stopping)
    print(f"report: {report}")
    return 0


def disconnect() -> None:
    """Leave the cluster, or end this process's own, if Ray was started at all."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        with ending_descendants():
            ray.shutdown()
