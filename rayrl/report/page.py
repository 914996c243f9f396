"""The report of one run: report.json (the facts) and report.html (one file, no script, nothing to load).

Built from the run directory alone, at any time; what the run has not reached is shown as not run. Model
output is untrusted data: the template escapes it, figures are images, a content security policy forbids more.
"""

import base64
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from rayrl.report import plots
from rayrl.report.figures import draw_figures
from rayrl.report.settings import shown_settings
from rayrl.report.summary import gain, plus_minus, summarize_run
from rayrl.report.tables import read_parquet
from rayrl.runs import storage

__all__ = ["draw_figures", "read_parquet", "write_report"]
NUM_SAMPLES = 20
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
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": plus_minus, "number": _number, "duration": _duration, "text": _text}
    html = environment.get_template(f"{facts['pipeline']}.html.jinja").render(
        facts=facts,
        gain=gain(facts),
        settings=shown_settings(facts["config"]),
        figures={name: _image(figure) for name, figure in draw_figures(run_dir, facts, evaluated).items()},
        samples=_samples(evaluated),
    )
    storage.write_bytes(storage.join(run_dir, "report.html"), html.encode())
    storage.write_json(storage.join(run_dir, "report.json"), facts)
    return facts


def _samples(evaluated: pa.Table | None) -> list[dict[str, Any]]:
    """Evenly spaced rows of the evaluation table: shown as they come, not picked."""
    if evaluated is None or not evaluated.num_rows:
        return []
    num = min(NUM_SAMPLES, evaluated.num_rows)
    return evaluated.take(np.linspace(0, evaluated.num_rows - 1, num).astype(int)).to_pylist()


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
