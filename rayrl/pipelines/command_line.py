"""Command line of the entry points in jobs/: plan, or run to the report. Exit code 2 for a user's mistake."""

import importlib
import logging
import os
import sys
import time

from rayrl.config import RunConfig, load_config
from rayrl.errors import ConfigError, RayRLError

STOPPED = 130
"""Exit code of a run that was stopped by `rayrl stop` or Ctrl-C."""
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
    try:
        config = load_config(arguments[0], [argument for argument in arguments[1:] if argument != "--plan"])
        if config.pipeline != name:
            raise ConfigError(
                f'pipeline must be "{name}" for jobs/{name}.py, got "{config.pipeline}"; '
                f"run jobs/{config.pipeline}.py, or change it"
            )
        return plan(config) if "--plan" in arguments else run(config)
    except RayRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues the run", file=sys.stderr)
        return STOPPED


def plan(config: RunConfig) -> int:
    """Print the resolved config, the stages, what they need and what they cost; start nothing."""
    from rayrl.preflight import check, render_plan

    print(config.model_dump_json(indent=2))
    print(render_plan(check(config)))
    return 0


def run(config: RunConfig) -> int:
    """Check everything, connect to Ray (RAY_ADDRESS, or a cluster of its own), and run to the report."""
    import ray

    from rayrl.fleets.control import NAMESPACE
    from rayrl.pipelines.run_pipeline import run_pipeline
    from rayrl.preflight import check

    plan = check(config, contact_oracle=True)
    started = time.monotonic()
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            namespace=NAMESPACE,
            include_dashboard=None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    pipeline = getattr(importlib.import_module(f"rayrl.pipelines.{config.pipeline}"), config.pipeline)
    report = run_pipeline(config, plan, pipeline, ray_start_s=time.monotonic() - started)
    print(f"report: {report}")
    return 0
