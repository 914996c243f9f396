"""Command `rayrl`: plan and run configs, look at runs, scale and stop them.

A user's mistake ends in one message on stderr and exit code 2. Heavy imports wait until a command needs them.
"""

import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrl import __version__
from rayrl.errors import RayRLError
from rayrl.pipelines import command_line

if TYPE_CHECKING:
    from rayrl.fleets.actors import Actor
    from rayrl.metrics.fleet_state import FleetState
    from rayrl.report.facts import PaidQueries, RunFacts
    from rayrl.report.stage_progress import Progress

app = typer.Typer(
    name="rayrl",
    help="Plan, run, watch, scale and stop rayrl runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _readable(place: str) -> str:
    """Refuse a remote folder that does not answer, before a command reads it."""
    if "://" in place:
        from rayrl.preflight.run_folder import check_place

        check_place(place, "run_dir")
    return place


RunDir = Annotated[str, typer.Argument(callback=_readable, help="A run directory: local, NFS or any fsspec URL.")]
LiveRun = Annotated[str, typer.Argument(help="The name or the directory of a run that goes on.")]
LEDGER_WIDTH = 200
"""Characters of a line that `rayrl ledger` may take."""
STOP_TIMEOUT_S = 120.0
"""Longest wait for a run to end."""


ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="The run's TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings to change: select.budget=64")
]
AsJson = Annotated[bool, typer.Option("--json", help="Show the resolved config and the plan as JSON.")]
# Flags that are not declared are given on, to be named by the one reader of these arguments.
ANY_FLAG = {"ignore_unknown_options": True}


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"rayrl {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command(context_settings=ANY_FLAG)
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show the plan.")] = False,
    as_json: AsJson = False,
    wait: Annotated[bool, typer.Option("--wait", help="Where people are asked: wait for their answers.")] = False,
) -> None:
    """Run a config to its report; again after any interruption: it continues."""
    flags = [*["--plan"] * plan, *["--json"] * as_json, *["--wait"] * wait]
    _plan_or_run("run", [config, *(overrides or []), *flags])


@app.command(context_settings=ANY_FLAG)
def plan(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the config and show the stages, what they need and what they cost. Starts nothing."""
    _plan_or_run("plan", [config, *(overrides or []), "--plan", *["--json"] * as_json])


def _plan_or_run(command: str, arguments: list[str]) -> None:
    raise typer.Exit(command_line.main(None, arguments, None, command=f"rayrl {command}"))


@app.command(context_settings=ANY_FLAG)
def study(
    config: Annotated[str, typer.Argument(metavar="STUDY.toml", help="The study's TOML file.")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show the cells and what they may pay for.")] = False,
) -> None:
    """Compare strategies, budgets and settings over seeds, with error bars; again after any interruption."""
    from rayrl.study.command import main

    raise typer.Exit(main(config, overrides or [], only_plan=plan))


@app.command()
def report(run_dir: RunDir) -> None:
    """Build report.html and report.json again, from the run directory alone."""
    from rayrl.report.page import write_report

    facts = write_report(run_dir)
    Console().print(Text(f"{facts.run_dir}/report.html"), soft_wrap=True)


@app.command()
def status(
    run_dir: RunDir,
    live: Annotated[bool, typer.Option("--live", help="Ask the cluster for the run's replicas, too.")] = False,
) -> None:
    """Show how far a run is and how fast it goes, what it has paid and what it has gained."""
    from rayrl.oracles.people.waiting import Waiting
    from rayrl.report.paid import answers
    from rayrl.report.summary import summarize_run
    from rayrl.runs import storage
    from rayrl.runs.run import noted_waiting

    facts = summarize_run(run_dir)
    table = Table("stage", "state", "result", "seconds", box=None, pad_edge=False, header_style="bold")
    table.columns[3].justify = "right"
    for stage in facts.stages:
        seconds = "" if stage.seconds is None else f"{stage.seconds:.1f}"
        table.add_row(stage.stage, _state(stage.state), Text(stage.summary or ""), seconds)
    console = Console()
    console.print(Text(facts.name, style="bold"), Text("; ".join(facts.controls), style="yellow"))
    console.print(table)
    if (waiting := noted_waiting(storage.absolute(run_dir))) is not None:
        console.print(Text(Waiting(**waiting).in_words(), style="yellow"), soft_wrap=True)
    for stage in facts.stages:
        if stage.progress is not None:
            console.print(Text(f"{stage.stage}: {going(stage.progress, time.time())}"), soft_wrap=True)
    console.print(Text(_headline(facts)), soft_wrap=True)
    for line in answers(facts.paid):
        console.print(Text(line), soft_wrap=True)
    if spent := _usd(facts):
        console.print(Text(spent), soft_wrap=True)
    if live:
        console.print(_replicas(run_dir))
    for caveat in facts.caveats:
        console.print(Text(f"! {caveat}", style="yellow"), soft_wrap=True)


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(callback=_readable, help="A folder of run directories.")] = "runs",
) -> None:
    """List the runs in a folder: how far they are, what they paid and what it bought."""
    from rayrl.errors import DataError, RunDirectoryError
    from rayrl.report.formats import plus_minus
    from rayrl.report.summary import summarize_run
    from rayrl.runs import storage

    fs, path = storage.locate(folder)
    if not fs.isdir(path):
        raise RunDirectoryError(
            f"folder must be an existing folder of runs, got {folder}; name the folder that holds your run directories"
        )
    table = Table(
        "run", "pipeline", "seed", "reached", "paid", "gain", "control", box=None, pad_edge=False, header_style="bold"
    )
    refusals: list[str] = []
    for config in sorted(map(str, fs.glob(f"{path}/*/config.json"))):
        try:
            facts = summarize_run(fs.unstrip_protocol(config.rpartition("/")[0]))
        except DataError as error:  # a run of another version must not hide the others
            refusals.append(str(error))
            continue
        done = [stage.stage for stage in facts.stages if stage.state == "done"]
        table.add_row(
            Text(facts.name),
            Text(facts.pipeline),
            str(facts.seed),
            done[-1] if done else "-",
            _paid(facts.paid.label),
            plus_minus(facts.gain, signed=True),
            Text("; ".join(facts.controls)),
        )
    console = Console()
    console.print(table if table.rows else Text(f"no runs in {folder}"))
    for refusal in refusals:
        console.print(Text(f"! {refusal}", style="yellow"), soft_wrap=True)


@app.command()
def ledger(
    run_dir: Annotated[
        str, typer.Argument(callback=_readable, help="The directory of a run or a study: local, NFS or any fsspec URL.")
    ],
    export: Annotated[
        str | None,
        typer.Option("--export", help="Write all questions and answers to a .parquet, .csv, .jsonl or .sqlite file."),
    ] = None,
) -> None:
    """Show what a run, or all of a study, has asked and paid, by stage and judge; also while it goes on."""
    from rayrl.report import ledger_counts
    from rayrl.runs import storage
    from rayrl.study.ledger import find_ledger

    console = Console()
    location, ids = find_ledger(run_dir)
    if export is not None:
        num_rows = ledger_counts.export(location, storage.absolute(export))
        console.print(Text(f"{num_rows} attempts written to {export}"), soft_wrap=True)
    table = Table(
        *("stage", "judge", "spent", "answered", "abstained", "lost", "refunded", "in flight", "taken over", "paid"),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    spending = ledger_counts.spending_by_stage(location, ids)
    for (stage, judge), found in spending.items():
        counts = (found.spent, found.scored, found.abstained, found.lost, found.refunded, found.in_flight)
        table.add_row(Text(stage or "-"), Text(judge), *map(str, (*counts, found.taken_over)), found.price())
    # Wider than a narrow terminal rather than cut: the names of judges are long.
    wide = Console(width=max(console.width, LEDGER_WIDTH))
    wide.print(table if spending else Text(f"nothing was asked: {location}"))
    for (stage, _), found in spending.items():
        for reason, num in found.abstentions.items():
            console.print(Text(f"{stage or '-'}: {num} abstained: {reason}"), soft_wrap=True)


@app.command()
def verify(
    run_dir: RunDir,
    repair: Annotated[
        bool, typer.Option("--repair", help="Let the command that started the run make what is damaged again.")
    ] = False,
) -> None:
    """Read every file of a run's finished stages, and name those that are damaged; exit code 1 if any is."""
    from rayrl.runs import storage
    from rayrl.runs.run import read_config
    from rayrl.runs.verification import damaged_stages, repair_stage, what_is_lost

    url, config, console = storage.absolute(run_dir), read_config(run_dir), Console()
    stages = damaged_stages(url, config)
    for stage in stages.damaged:
        for name, what in stage.wrong.items():
            console.print(Text(f"{stage.folder}/{name} {what}"), soft_wrap=True)
        console.print(Text(what_is_lost(stage)), soft_wrap=True)
        if repair:
            repair_stage(stage)
    files = f"{stages.num_files} files of {stages.num_stages} finished stages"
    if not stages.damaged:
        console.print(Text(f"{files} are as they were written"), soft_wrap=True)
        return
    remedy = "removed; start the run's command again" if repair else "`rayrl verify --repair` removes what is damaged"
    console.print(Text(f"{files} were read; {len(stages.damaged)} stages are damaged: {remedy}"), soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def meter(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Show every number, and the curve with its bands.")] = False,
) -> None:
    """Show what a run's labels have taught, and what more of them would. Costs nothing."""
    from rayrl.report.formats import json_value
    from rayrl.report.label_meter import advice, meter_rows, run_meter
    from rayrl.report.recorded_run import read_run

    found, console = run_meter(read_run(run_dir)), Console()
    if as_json:
        content = {"advice": advice(found), "meter": json_value(found)}
        console.print_json(json.dumps(content))
        return
    table = Table("labels", "90% interval in brackets", box=None, pad_edge=False, header_style="bold")
    for name, value in meter_rows(found):
        table.add_row(name, Text(value))
    console.print(table)
    console.print(Text(advice(found)), soft_wrap=True)


@app.command()
def scale(
    run: LiveRun,
    sizes: Annotated[list[str] | None, typer.Argument(help="generators=4 embedders=1-8 oracle=32 ROLE=auto")] = None,
) -> None:
    """Show a run's fleets and oracle; with sizes, resize them: a number, a range, or auto for what the config says."""
    from rayrl.fleets.sizes import parse_sizes

    parsed = parse_sizes(sizes or [])
    control = _control(run)
    from rayrl.fleets.control import ask

    if parsed:
        ask(control, "scale", parsed)
    Console().print(fleet_table(ask(control, "states")))


@app.command()
def stop(run: LiveRun) -> None:
    """End a run. The same command continues it. Answers that do not come within seconds are lost, and counted."""
    control = _control(run)
    import ray
    from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

    from rayrl.errors import StageTimeout

    deadline = time.monotonic() + STOP_TIMEOUT_S
    while True:
        # The control never answers: the call fails when the run has ended, and the control with it.
        stopped = control.stop.options(max_task_retries=0).remote()
        try:
            ray.get(stopped, timeout=max(0.0, deadline - time.monotonic()))
        except ActorUnavailableError:  # Ray starts the control again, which has forgotten the request
            continue
        except ActorDiedError:  # the last thing a run does is to end its control
            return Console().print(Text(f"{run} has ended; the command that started it continues it"), soft_wrap=True)
        except GetTimeoutError:
            raise StageTimeout(
                f"{run} was asked to stop and has not ended within {STOP_TIMEOUT_S:.0f} s; `ray job stop` or killing "
                "its driver ends it at once"
            ) from None


def going(progress: "Progress", now: float) -> str:
    """Say how a stage under way goes; `now` is a Unix time."""
    from rayrl.report.formats import duration

    total = "" if progress.total is None else f" of {progress.total:,}"
    rate = "-" if progress.per_s is None else f"{progress.per_s:,.3g}"
    eta = duration(progress.eta_s, missing="-")
    since = duration(max(0.0, now - progress.at))
    return f"{progress.done:,}{total} {progress.unit}, {rate} {progress.items}/s, ETA {eta}; last sign {since} ago"


def fleet_table(states: Sequence["FleetState"]) -> Table:
    """Make a table of fleets: replicas that are ready, starting and draining, calls and waiting ones, the bounds."""
    table = Table(
        *("fleet", "ready", "starting", "draining", "calls", "waiting", "size"),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for state in states:
        least, most = state["least"], state["most"]
        counts = (state["ready"], state["starting"], state["draining"], state["calls"], state["waiting"])
        size = str(most) if least == most else f"{least}-{most}"
        table.add_row(Text(state["name"]), *map(str, counts), size)
        if state["failure"]:
            # The last line of a traceback is its message.
            table.add_row(Text(f"! {state['failure'].strip().splitlines()[-1]}", style="yellow"))
    return table


def _replicas(run: str) -> Table | Text:
    """Show the fleets of a run that is alive in the cluster; else why they cannot be shown, which ends no command."""
    from ray.exceptions import RayError

    from rayrl.fleets.control import ask

    try:
        return fleet_table(ask(_control(run), "states"))
    except (RayRLError, RayError) as error:
        return Text(f"replicas: {error}", style="dim")


def _control(run: str) -> "Actor":
    """Find the control of a live run, named or given by its directory; connects to the cluster.

    Without RAY_ADDRESS that is the cluster which the directory names, or for a name the newest one on the machine.
    """
    from rayrl.runs import storage
    from rayrl.runs.run import CONFIG, noted_cluster, read_config

    is_folder = storage.exists(storage.join(storage.absolute(run), CONFIG))
    name = read_config(run).name if is_folder else run
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die

    from rayrl.errors import ResourceError
    from rayrl.fleets.connection import LOCAL, NAMESPACE, check_answers, cluster_address
    from rayrl.fleets.control import find_control

    if not ray.is_initialized():
        address = cluster_address()
        noted = noted_cluster(storage.absolute(run)) if is_folder and address == LOCAL else None
        try:
            if noted is not None:
                address = _answering(run, noted)
            else:
                if address in (LOCAL, "auto"):
                    address = canonicalize_bootstrap_address_or_die("auto")
                check_answers(address)
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        except ResourceError:
            raise
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"RAY_ADDRESS must name a running cluster, got {address}: {error}; start it, or submit this command to "
                "it with `ray job submit -- rayrl ...`"
            ) from None
    return find_control(name)


def _answering(run: str, noted: str) -> str:
    """Return the address of the cluster that a run's directory names.

    Raises:
        ResourceError: it does not answer, so that the run cannot be going on.
    """
    from rayrl.errors import ResourceError
    from rayrl.fleets.connection import why_unreachable

    reason = why_unreachable(noted)
    if reason is not None:
        raise ResourceError(
            f"{run} cannot be reached: it went on last in the cluster at {noted}: {reason}; `rayrl status {run}` shows "
            "how far it is, and the command that started it continues it"
        )
    return noted


def _state(state: str) -> Text:
    return Text(state, style={"done": "green", "started": "yellow"}.get(state, "dim"))


def _headline(facts: "RunFacts") -> str:
    """Say what was paid and what it bought."""
    from rayrl.report.formats import plus_minus
    from rayrl.report.settings import label_queries

    label, evaluate = _paid(facts.paid.label), _paid(facts.paid.evaluate)
    headline = (
        f"paid {label_queries(facts.run.config)} {label}, evaluation queries {evaluate}, "
        f"gain over M1 {plus_minus(facts.gain, signed=True)}"
    )
    if facts.gain_over_ppo is not None:
        headline += f", over plain PPO {plus_minus(facts.gain_over_ppo, signed=True)}"
    return headline


def _usd(facts: "RunFacts") -> str:
    """Say what all queries have cost, of what they may, or that there is no price; empty before any is asked."""
    paid = [facts.paid.label, facts.paid.evaluate, facts.paid.test, facts.paid.people]
    prices = facts.run.config.oracle.prices()
    if prices is None:
        num_tokens = sum((each.input_tokens or 0) + (each.output_tokens or 0) for each in paid)
        return f"unpriced: {num_tokens:,} tokens read and written" if num_tokens else ""
    limit = prices.budget_usd
    spent = sum(each.cost_usd or 0.0 for each in paid)
    return f"spent {spent:,.2f} USD" + ("" if limit is None else f" / {limit:,.2f}")


def _paid(paid: "PaidQueries") -> str:
    return f"{'-' if paid.spent is None else paid.spent} / {paid.budget}"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `rayrl`; `arguments` default to the command line's."""
    try:
        app(args=arguments)
    except RayRLError as error:
        Console(stderr=True).print(Text(f"error: {error}"), soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
