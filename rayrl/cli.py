"""`rayrl`: plan runs and look at them. The work itself is started from jobs/.

A user's mistake ends in one message on stderr and exit code 2. Heavy imports wait until a command needs them.
"""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrl.errors import RayRLError

app = typer.Typer(
    name="rayrl",
    help="Plan, watch and report rayrl runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RunDir = Annotated[str, typer.Argument(help="A run directory: local, NFS or any fsspec URL.")]


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
    from rayrl.telemetry.report import write_report

    facts = write_report(run_dir)
    Console().print(Text(f"{facts['run_dir']}/report.html"), soft_wrap=True)


@app.command()
def status(run_dir: RunDir) -> None:
    """Show how far a run is, what it has paid and what it has gained."""
    from rayrl.telemetry.summary import summarize_run

    facts = summarize_run(run_dir)
    table = Table("stage", "state", "result", "seconds", box=None, pad_edge=False, header_style="bold")
    table.columns[3].justify = "right"
    for stage in facts["stages"]:
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        table.add_row(stage["stage"], _state(stage["state"]), Text(stage["summary"] or ""), seconds)
    console = Console()
    console.print(Text(facts["name"], style="bold"), Text("; ".join(facts["control"]), style="yellow"))
    console.print(table)
    console.print(Text(_headline(facts)), soft_wrap=True)
    for caveat in facts["caveats"]:
        console.print(Text(f"! {caveat}", style="yellow"), soft_wrap=True)


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(help="A folder of run directories.")] = "runs",
) -> None:
    """List the runs in a folder: how far they are, what they paid and what it bought."""
    from rayrl.errors import RunDirectoryError
    from rayrl.runs import storage
    from rayrl.telemetry.summary import gain, plus_minus, summarize_run

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


def _state(state: str) -> Text:
    return Text(state, style={"done": "green", "started": "yellow"}.get(state, "dim"))


def _headline(facts: dict[str, Any]) -> str:
    """What was paid and what it bought."""
    from rayrl.telemetry.summary import gain, plus_minus

    if facts["pipeline"] != "rlp":
        return f"paid label queries {_paid(facts)}, gain {plus_minus(gain(facts), signed=True)}"
    rlp = facts["rlp"]
    over_ppo = f", over plain PPO {plus_minus(rlp['gain_over_ppo'], signed=True)}" if rlp["aligned"] == "rlp" else ""
    return (
        f"paid {rlp['asked']} {_paid(facts)}, evaluation queries {_paid(facts, 'evaluate')}, "
        f"gain over M1 {plus_minus(gain(facts), signed=True)}{over_ppo}"
    )


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
