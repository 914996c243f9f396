"""Command that plans a config or runs it to the report: `rayrl run`, and the entry points in jobs/.

Exit code 2 for a user's mistake, 75 for a run that waits for people.
"""

import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from rayrl import __version__
from rayrl.config import RunConfig, load_config
from rayrl.errors import RayRLError, WaitingForPeople
from rayrl.pipelines.arguments import Arguments, read_arguments, usage
from rayrl.pipelines.people import wait_for_people
from rayrl.pipelines.stopping import MESSAGE, Stopping, stoppable
from rayrl.runs.guard import ending_descendants, guard_this_process

logger = logging.getLogger(__name__)

WAITING_EXIT_CODE = os.EX_TEMPFAIL
"""Of a run that is parked: 75, "try again later"."""
PARKED = (
    "nothing of the run is going on any more; the same command continues it with what is answered then, and with "
    "--wait it looks itself. The settings enough and deadline of the people end the waiting with what there is"
)


def main(name: str | None, arguments: list[str], about: str | None, *, command: str | None = None) -> int:
    """Run the pipeline of a config, or with --plan only say what it would do.

    Args:
        name: the config's `pipeline`, where the command is for one only.
        arguments: the command line's.
        about: first lines of --help.
        command: as the user writes it; None is the one of jobs/.
    """
    return stoppable_command(partial(_run_command, name, arguments, about, command))


def stoppable_command(command: Callable[[Stopping], int]) -> int:
    """Run a command that signals may stop; return its exit code: 2 for a user's mistake, told in one message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with stoppable() as stopping:
        try:
            return command(stopping)
        except BaseException as error:
            # What a library raises because it was interrupted counts as the interruption.
            if stopping.exit_code is not None:
                print(MESSAGE, file=sys.stderr, flush=True)
                disconnect()
                # An ordinary exit joins threads, some of which wait for answers of the cluster that has ended.
                sys.stdout.flush()
                os._exit(stopping.exit_code)
            if isinstance(error, WaitingForPeople):
                print(f"{error}\n  {PARKED}", file=sys.stderr, flush=True)
                return WAITING_EXIT_CODE
            if isinstance(error, RayRLError):
                print(f"error: {error}", file=sys.stderr)
                return 2
            raise


def _run_command(
    name: str | None, arguments: list[str], about: str | None, command: str | None, stopping: Stopping
) -> int:
    given = read_arguments(arguments)
    if "--help" in given.flags:
        print(f"{about}\n{usage(command or f'python jobs/{name}.py')}")
        return 0
    if "--version" in given.flags:
        print(f"rayrl {__version__}")
        return 0
    return _plan_or_run(name, given, stopping)


def _plan_or_run(name: str | None, given: Arguments, stopping: Stopping) -> int:
    config = load_config(given.config, list(given.overrides), pipeline=name)
    if "--plan" in given.flags:
        return plan(config, as_json="--json" in given.flags)
    return run(config, stopping, waits="--wait" in given.flags)


def plan(config: RunConfig, *, as_json: bool = False) -> int:
    """Print the stages, what they need and what they cost, or these and the resolved config as JSON; start nothing."""
    from rayrl.preflight import check, plan_as_json, render_plan

    decided = check(config)
    print(plan_as_json(config, decided) if as_json else render_plan(decided))
    return 0


def run(config: RunConfig, stopping: Stopping, *, waits: bool = False) -> int:
    """Check everything, connect to the cluster (`rayrl.fleets.connection`), and run to the report.

    Args:
        config: the run.
        stopping: this process's handlers of signals.
        waits: look for people's answers again and again, instead of parking the run. Meanwhile it has no actor.

    Raises:
        WaitingForPeople: people have not answered enough questions, and nobody waits for them here.
    """
    from rayrl.preflight import check

    plan = check(config, contact_oracle=True)
    # Only here: it imports Ray, and a refusal comes before that.
    from rayrl.pipelines.run_pipeline import run_pipeline

    started = time.monotonic()
    connect_stoppable(stopping)
    pipeline = getattr(importlib.import_module(f"rayrl.pipelines.{config.pipeline}"), config.pipeline)
    ray_start_s = time.monotonic() - started
    while True:
        try:
            report = run_pipeline(config, plan, pipeline, ray_start_s=ray_start_s, stopping=stopping)
            break
        except WaitingForPeople as error:
            if not waits:
                raise
            logger.info("%s", error)
            wait_for_people(config)
    print(f"report: {report}")
    return 0


def connect_stoppable(stopping: Stopping) -> None:
    """Connect to the cluster, as `rayrl.fleets.connection` decides, in a process that signals may stop."""
    from rayrl.fleets.connection import connect

    # Before Ray starts anything that it would have to end.
    guard_this_process()
    try:
        connect()
    except SystemExit as error:  # what Ray's own handler raises until `install` replaces it
        if error.code != signal.SIGTERM:
            raise
        stopping.stop(signal.SIGTERM)
    stopping.install()


def disconnect() -> None:
    """Leave the cluster, or end this process's own, if Ray was started at all."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        with ending_descendants():
            ray.shutdown()
