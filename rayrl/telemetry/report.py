"""The report of one run: report.json (the facts) and report.html (one file, no script, nothing to load).

Built from the run directory alone, at any time; what the run has not reached is shown as not run. Model
output is untrusted data: the template escapes it, figures are images, a content security policy forbids more.
"""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from matplotlib.figure import Figure

from rayrl.runs import storage
from rayrl.telemetry import plots
from rayrl.telemetry.metrics import read_metrics
from rayrl.telemetry.summary import gain, plus_minus, summarize_run

NUM_SAMPLES = 20
CURVE_STAGES = ("sft", "fit_evaluator", "dpo")
SHOWN_SETTINGS = {
    "policy": "policy.path",
    "prompts": "pool.path",
    "responses per prompt": "generate.k",
    "selection": "select.strategy",
    "unit": "select.unit",
    "embedded text": "select.text",
    "expert": "oracle.type",
    "expert model": "oracle.model",
    "expert function": "oracle.function",
    "evaluator": "evaluator.type",
    "scoring": "evaluator.scoring",
    "pairing": "pseudo_label.pairing",
    "DPO loss": "dpo.loss",
    "DPO beta": "dpo.beta",
    "DPO learning rate": "dpo.learning_rate",
    "DPO epochs": "dpo.epochs",
}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write_report(run_dir: str) -> dict[str, Any]:
    """Write report.json and report.html into a run directory; returns the facts in report.json.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: one of its files is damaged.
    """
    facts = summarize_run(run_dir)
    evaluated = read_parquet(storage.join(run_dir, "stages", "evaluate", "table"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": plus_minus, "number": _number, "duration": _duration, "text": _text}
    html = environment.get_template("report.html.jinja").render(
        facts=facts,
        gain=gain(facts),
        settings=_settings(facts["config"]),
        figures={name: _image(figure) for name, figure in draw_figures(run_dir, facts, evaluated).items()},
        samples=_samples(evaluated),
    )
    storage.write_bytes(storage.join(run_dir, "report.html"), html.encode())
    storage.write_json(storage.join(run_dir, "report.json"), facts)
    return facts


def draw_figures(run_dir: str, facts: dict[str, Any], evaluated: pa.Table | None) -> dict[str, Figure]:
    """Every figure the run has data for, by name. `evaluated` is the table of `evaluate`, if there is one."""
    metrics = facts["metrics"]
    figures: dict[str, Figure] = {}
    if evaluated is not None:
        m1, m2 = (evaluated[name].drop_null().to_numpy() for name in ("m1_score", "m2_score"))
        if len(m1) and len(m2):
            figures["scores"] = plots.plot_scores(m1, m2)
    if any(metrics["query"].get("score_histogram", {}).values()):
        figures["paid_scores"] = plots.plot_paid_scores(metrics["query"]["score_histogram"])
    bins = metrics["fit_evaluator"].get("validation", {}).get("calibration", [])
    if any(b["num"] for b in bins):
        figures["calibration"] = plots.plot_calibration(bins)
    projection = read_parquet(storage.join(run_dir, "stages", "select", "projection.parquet"))
    if projection is not None and projection.num_rows:
        x, y, selected = (projection[name].to_numpy() for name in ("x", "y", "selected"))
        figures["coverage"] = plots.plot_coverage(x, y, selected)
    if len(metrics["select"].get("radius") or []) > 1:
        figures["radius"] = plots.plot_radius(metrics["select"]["radius"])
    curves = {stage: read_metrics(storage.join(run_dir, "metrics", f"{stage}.jsonl")) for stage in CURVE_STAGES}
    if any(curves.values()):
        figures["curves"] = plots.plot_curves(curves)
    return figures


def read_parquet(url: str) -> pa.Table | None:
    """A Parquet file, or all parts of a folder; None if there is nothing yet."""
    fs, path = url_to_fs(url)
    parts = [path] if fs.isfile(path) else sorted(fs.glob(f"{path}/part-*.parquet"))
    tables = []
    for part in parts:
        with fs.open(part, "rb") as file:
            tables.append(pq.read_table(io.BytesIO(file.read())))
    return pa.concat_tables(tables) if tables else None


def _samples(evaluated: pa.Table | None) -> list[dict[str, Any]]:
    """Evenly spaced rows of the evaluation table: shown as they come, not picked."""
    if evaluated is None or not evaluated.num_rows:
        return []
    num = min(NUM_SAMPLES, evaluated.num_rows)
    return evaluated.take(np.linspace(0, evaluated.num_rows - 1, num).astype(int)).to_pylist()


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    shown = {}
    for title, dotted in SHOWN_SETTINGS.items():
        section, name = dotted.split(".")
        if (value := config.get(section, {}).get(name)) is not None:
            shown[title] = value
    return shown


def _image(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plots.to_svg(figure).encode()).decode()


def _number(value: Any, format: str = ",.0f", missing: str = "not run") -> str:
    return missing if value is None or isinstance(value, jinja2.Undefined) else f"{value:{format}}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _text(value: str) -> str:
    """Text with control and direction-changing characters made visible; the template escapes the rest."""
    return _UNPRINTABLE.sub("\ufffd", value)
