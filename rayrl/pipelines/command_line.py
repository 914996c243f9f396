"""Command that plans a config or runs it to the report: `rayrl run`, and the entry points in jobs/.

Exit code 2 for a user's mistake.
"""

import importlib
import logging
import os
import sys
import time

from rayrl import __version__
from rayrl.config import RunConfig, load_config
from rayrl.errors import RayRLError
from rayrl.pipelines.arguments import read_arguments, usage

STOPPED = 130
"""Exit code of a run that was stopped by `rayrl stop` or Ctrl-C."""


def main(name: str | None, arguments: list[str], about: str | None, *, command: str | None = None) -> int:
    """Run the pipeline of a config, or with --plan only say what it would do.

    Args:
        name: the config's `pipeline`, where the command is for one only.
        arguments: the command line's.
        about: first lines of --help.
        command: as the user writes it; None is the one of jobs/.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        given = read_arguments(arguments)
        if "--help" in given.flags:
            print(f"{about}\n{usage(command or f'python jobs/{name}.py')}")
            return 0
        if "--version" in given.flags:
            print(f"rayrl {__version__}")
            return 0
        config = load_config(given.config, list(given.overrides), pipeline=name)
        return plan(config, as_json="--json" in given.flags) if "--plan" in given.flags else run(config)
    except RayRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues the run", file=sys.stderr)
        return STOPPED


def plan(config: RunConfig, *, as_json: bool = False) -> int:
    """Print the stages, what they need and what they cost, or these and the resolved config as JSON; start nothing."""
    from rayrl.preflight import check, plan_as_json, render_plan

    decided = check(config)
    print(plan_as_json(config, decided) if as_json else render_plan(decided))
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
