"""The report of one run: report.json (the facts) and report.html (one file, no script, nothing to load).

Built from the run directory alone, at any time; what the run has not reached is shown as not run. Model output is
untrusted data: the template escapes it, figures are images, a content security policy forbids more.
"""

import base64
from dataclasses import fields, replace
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from pydantic import JsonValue

from rayrl.report import formats, plots
from rayrl.report.facts import RunFacts
from rayrl.report.figures import draw_figures
from rayrl.report.label_meter import found_meter
from rayrl.report.sections import PAPERS, sections, tiles
from rayrl.report.settings import shown_settings
from rayrl.report.summary import summarize_run
from rayrl.runs import storage


def write_report(run_dir: str) -> RunFacts:
    """Write report.json and report.html into a run directory; returns the facts of both.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: one of its files is damaged, or of another version of rayrl.
    """
    facts = summarize_run(run_dir)
    facts = replace(facts, meter=found_meter(facts.run))
    storage.write_bytes(storage.join(facts.run_dir, "report.html"), render_html(facts).encode())
    storage.write_json(storage.join(facts.run_dir, "report.json"), render_json(facts))
    return facts


def render_html(facts: RunFacts) -> str:
    """Write the page of a run."""
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            tiles=tiles(facts),
            sections=sections(facts),
            settings=shown_settings(facts.run.config),
            figures={name: image_of(figure) for name, figure in draw_figures(facts).items()},
            paper=PAPERS[facts.pipeline],
        )
    )


def environment(*folders: Path) -> jinja2.Environment:
    """Make the environment of the pages: templates of the report, and those in other folders."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent / "templates", *folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt field is an error, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formats.number,
        "duration": formats.duration,
        "printable": formats.printable,
    }
    return environment


def render_json(facts: RunFacts) -> dict[str, JsonValue]:
    """Write the facts as JSON values: one schema for both pipelines, what is not known as null.

    `metrics` holds each stage's metrics by its name, those of the last round that finished it; `rounds` those of every
    round, where there are several.
    """
    run = facts.run
    content: dict[str, JsonValue] = {}
    for field in fields(facts):
        if field.name != "run":
            content[field.name] = formats.json_value(getattr(facts, field.name))
    content["config"] = run.config.model_dump(mode="json")
    metrics: dict[str, JsonValue] = {}
    rounds: list[dict[str, JsonValue]] = [{} for _ in run.rounds()]
    for stage, number in run.manifests:
        # Repeated rounds give the same value: the last round's.
        metrics[stage.name] = formats.json_value(run.last(stage))
        rounds[number - 1][stage.name] = formats.json_value(run.metrics(stage, number))
    content["metrics"] = metrics
    content["rounds"] = formats.json_value(rounds if len(rounds) > 1 else [])
    return content


def image_of(figure: Figure) -> str:
    """Write a figure as the address of an image that loads nothing."""
    # As an image an SVG can neither run scripts nor load anything, whatever text is drawn in it.
    return "data:image/svg+xml;base64," + base64.b64encode(plots.to_svg(figure).encode()).decode()
