"""`rayrl`: plan runs, look at them, scale and stop them. The work itself is started from jobs/.

A user's mistake ends in one message on stderr and exit code 2. Heavy imports wait until a command needs them.
"""

import logging
import os
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrl.errors import RayRLError

app = typer.Typer(
    name="rayrl",
    help="Plan, watch, scale and stop rayrl runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RunDir = Annotated[str, typer.Argument(help="A run directory: local, NFS or any fsspec URL.")]
LiveRun = Annotated[str, typer.Argument(help="The name or the directory of a run that goes on.")]
STOP_TIMEOUT_S = 120.0


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="The run's TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted settings: select.budget=64")] = None,
) -> None:
    """Show the resolved config, the stages, what they need and what they cost. Starts nothing."""
    from rayrl.config import load_config

    resolved = load_config(config, overrides)
    from rayrl.preflight import check, render_plan

    Console().print(Text(render_plan(check(resolved))), soft_wrap=True)


@app.command()
def report(run_dir: RunDir) -> None:
    """Build report.html and report.json again, from the run directory alone."""
    from rayrl.report.page import write_report

    facts = write_report(run_dir)
    Console().print(Text(f"{facts['run_dir']}/report.html"), soft_wrap=True)


@app.command()
def status(
    run_dir: RunDir,
    live: Annotated[bool, typer.Option("--live", help="Ask the cluster for the run's replicas, too.")] = False,
) -> None:
    """Show how far a run is and how fast it goes, what it has paid and what it has gained."""
    from rayrl.report.summary import summarize_run

    facts = summarize_run(run_dir)
    table = Table("stage", "state", "result", "seconds", box=None, pad_edge=False, header_style="bold")
    table.columns[3].justify = "right"
    for stage in facts["stages"]:
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        table.add_row(stage["stage"], _state(stage["state"]), Text(stage["summary"] or ""), seconds)
    console = Console()
    console.print(Text(facts["name"], style="bold"), Text("; ".join(facts["control"]), style="yellow"))
    console.print(table)
    for stage in facts["stages"]:
        if stage.get("pace"):
            console.print(Text(f"{stage['stage']}: {going(stage['pace'], time.time())}"), soft_wrap=True)
    console.print(Text(_headline(facts)), soft_wrap=True)
    if spent := _usd(facts):
        console.print(Text(spent), soft_wrap=True)
    if live:
        console.print(_replicas(run_dir))
    for caveat in facts["caveats"]:
        console.print(Text(f"! {caveat}", style="yellow"), soft_wrap=True)


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(help="A folder of run directories.")] = "runs",
) -> None:
    """List the runs in a folder: how far they are, what they paid and what it bought."""
    from rayrl.errors import RunDirectoryError
    from rayrl.report.summary import gain, plus_minus, summarize_run
    from rayrl.runs import storage

    fs, path = storage.locate(folder)
    if not fs.isdir(path):
        raise RunDirectoryError(f"folder must be an existing folder of runs, got {folder}")
    table = Table(
        "run", "pipeline", "seed", "reached", "paid", "gain", "control", box=None, pad_edge=False, header_style="bold"
    )
    for config in sorted(map(str, fs.glob(f"{path}/*/config.json"))):
        facts = summarize_run(fs.unstrip_protocol(config.rpartition("/")[0]))
        done = [stage["stage"] for stage in facts["stages"] if stage["state"] == "done"]
        table.add_row(
            Text(facts["name"]),
            Text(facts["pipeline"]),
            str(facts["seed"]),
            done[-1] if done else "-",
            _paid(facts),
            plus_minus(gain(facts), signed=True),
            Text("; ".join(facts["control"])),
        )
    Console().print(table if table.rows else Text(f"no runs in {folder}"))


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
    """End a run. Nothing it has paid for is lost, and the same command continues it."""
    control = _control(run)
    import ray
    from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

    from rayrl.errors import StageTimeout

    deadline = time.monotonic() + STOP_TIMEOUT_S
    while True:
        told = control.stop.options(max_task_retries=0).remote()
        try:
            ray.get(told, timeout=max(0.0, deadline - time.monotonic()))
        except ActorUnavailableError:  # Ray starts it again, and it is told again
            continue
        except ActorDiedError:  # the last thing a run does is to end its control
            return Console().print(Text(f"{run} has ended; the command that started it continues it"), soft_wrap=True)
        except GetTimeoutError:
            raise StageTimeout(
                f"{run} was told to stop and has not ended within {STOP_TIMEOUT_S:.0f} s; `ray job stop` or killing "
                "its driver ends it at once"
            ) from None


def going(pace: dict[str, Any], now: float) -> str:
    """How a stage goes (rayrl/report/pace.py), for humans; `now` is a Unix time."""
    done = f"{pace['done']:,}" + (f" of {pace['total']:,}" if pace["total"] is not None else "") + f" {pace['unit']}"
    rate = "-" if pace["per_s"] is None else f"{pace['per_s']:,.3g}"
    eta = "-" if pace["eta_s"] is None else _duration(pace["eta_s"])
    return f"{done}, {rate} {pace['items']}/s, ETA {eta}; last sign {_duration(max(0.0, now - pace['at']))} ago"


def fleet_table(states: list[dict[str, Any]]) -> Table:
    """Fleets as rows: what is ready, starting and draining, who works and who waits, and the bounds."""
    table = Table(
        *("fleet", "ready", "starting", "draining", "calls", "waiting", "size"),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for state in states:
        least, most = state["least"], state["most"]
        counts = (str(state[name]) for name in ("ready", "starting", "draining", "calls", "waiting"))
        table.add_row(Text(state["name"]), *counts, str(most) if least == most else f"{least}-{most}")
        if state["failure"]:
            table.add_row(Text(f"! {state['failure'].strip().splitlines()[-1]}", style="yellow"))
    return table


def _replicas(run: str) -> Table | Text:
    """The fleets of a run that is alive in the cluster; else why they cannot be shown, which is no reason to fail."""
    from ray.exceptions import RayError

    from rayrl.fleets.control import ask

    try:
        return fleet_table(ask(_control(run), "states"))
    except (RayRLError, RayError) as error:
        return Text(f"replicas: {error}", style="dim")


def _control(run: str) -> Any:
    """The control of a live run, named or given by its directory; connects to the cluster."""
    from rayrl.runs import storage

    name, saved = run, storage.join(storage.absolute(run), "config.json")
    if storage.exists(saved):
        name = storage.read_json(saved)["name"]
    import ray

    from rayrl.errors import ResourceError
    from rayrl.fleets.control import NAMESPACE, find_control

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"RAY_ADDRESS must name a running cluster, got {address}: {error}; start it, or submit this command to "
                "it with `ray job submit -- rayrl ...`"
            ) from None
    return find_control(name)


def _state(state: str) -> Text:
    return Text(state, style={"done": "green", "started": "yellow"}.get(state, "dim"))


def _headline(facts: dict[str, Any]) -> str:
    """What was paid and what it bought."""
    from rayrl.report.summary import gain, plus_minus

    if facts["pipeline"] != "rlp":
        return f"paid label queries {_paid(facts)}, gain {plus_minus(gain(facts), signed=True)}"
    rlp = facts["rlp"]
    over_ppo = f", over plain PPO {plus_minus(rlp['gain_over_ppo'], signed=True)}" if rlp["aligned"] == "rlp" else ""
    return (
        f"paid {rlp['asked']} {_paid(facts)}, evaluation queries {_paid(facts, 'evaluate')}, "
        f"gain over M1 {plus_minus(gain(facts), signed=True)}{over_ppo}"
    )


def _usd(facts: dict[str, Any]) -> str:
    """What all queries have cost, of what they may; empty where the expert is free."""
    spent = sum(facts["paid"][purpose].get("cost_usd") or 0.0 for purpose in ("label", "evaluate"))
    limit = facts["config"].get("oracle", {}).get("budget_usd")
    if not spent and limit is None:
        return ""
    return f"spent {spent:,.2f} USD" + ("" if limit is None else f" / {limit:,.2f}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _paid(facts: dict[str, Any], purpose: str = "label") -> str:
    paid, budget = facts["paid"][purpose].get("spent", "-"), facts["paid"][purpose].get("budget")
    return f"{paid} / {'?' if budget is None else budget}"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `rayrl`; `arguments` default to the command line's."""
    try:
        app(args=arguments)
    except RayRLError as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
