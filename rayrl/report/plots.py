"""The report's figures: plain values in, a matplotlib Figure out. No pyplot, no global state, no files.

The notebook draws the same figures. `to_svg` turns one into text that stands alone.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

M1, M2, PPO, MUTED, INK, GRID = "#8a94a6", "#2563eb", "#d97706", "#c3cad5", "#1f2937", "#e5e9f0"
COLORS = {2: (M1, M2), 3: (M1, PPO, M2), 4: (M1, PPO, M2, MUTED)}
"""Of policies, M1 first and the run's result last."""
MORE = ("#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#65a30d")
"""Of what later rounds add, in turn."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, the reader's own font
    "svg.hashsalt": "rayrl",  # the same figure is the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
CURVES = ("loss", "validation_loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "kl")
"""Drawn first, in this order; then any other metric but those that say how, not what, was learned."""
UNPLOTTED = (
    "step",
    "epoch",
    "learning_rate",
    "lr",
    "grad_norm",
    "num_tokens",
    "seconds",
    "tokens_per_s",
    "padding_share",
)


def colors_of(num: int) -> list[str]:
    """Colors of so many policies, M1 first."""
    known = COLORS.get(num, COLORS[3])
    return [*known, *itertools.islice(itertools.cycle(MORE), num - len(known))]


@mpl.rc_context(STYLE)
def plot_scores(policies: Mapping[str, Sequence[float]]) -> Figure:
    """Share of evaluation responses at each expert score, by policy."""
    values = np.unique(np.concatenate(list(policies.values())))
    discrete = bool(np.all(values == np.round(values)))
    low, high = values[0], values[-1]
    edges = np.arange(low - 0.5, high + 1) if discrete else np.linspace(low, max(high, low + 1e-6), 12)
    centers, width = (edges[:-1] + edges[1:]) / 2, 0.8 / len(policies) * (edges[1] - edges[0])
    figure, axes = new_figure(5.2, 3.0)
    for i, ((name, scores), color) in enumerate(zip(policies.items(), colors_of(len(policies)), strict=True)):
        share = np.histogram(scores, edges)[0] / len(scores)
        label = f"{name}, mean {np.mean(scores):.2f} (n = {len(scores)})"
        axes.bar(centers + (i - (len(policies) - 1) / 2) * width, 100 * share, width, color=color, label=label)
    if discrete:
        axes.set_xticks(centers)
    axes.grid(axis="x", visible=False)
    title = "Expert scores before and after" if len(policies) == 2 else "Expert scores by policy"
    axes.set(xlabel="expert score", ylabel="% of responses", title=title)
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_paid_scores(histogram: Mapping[str, int]) -> Figure:
    """Number of paid judgements at each score."""
    scores = sorted(histogram, key=float)
    figure, axes = new_figure(5.2, 3.0)
    axes.bar(scores, [histogram[score] for score in scores], 0.6, color=MUTED)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="expert score", ylabel="paid judgements", title="What the expert said about M1's responses")
    return figure


@mpl.rc_context(STYLE)
def plot_calibration(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Expert against predicted score on held-out judgements; `bins` as in `validation.calibration`."""
    bins = [b for b in bins if b["num"]]
    predicted, expert = [b["mean_predicted"] for b in bins], [b["mean_expert"] for b in bins]
    figure, axes = new_figure(5.2, 3.0)
    ends = [min(predicted + expert), max(predicted + expert)]
    axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1, label="perfect")
    axes.plot(predicted, expert, color=M2, linewidth=1, alpha=0.5)
    axes.scatter(predicted, expert, s=[20 + 4 * b["num"] for b in bins], color=M2, label="held-out (area: number)")
    for b in bins:
        axes.annotate(f"{b['num']}", (b["mean_predicted"], b["mean_expert"]), (0, -13), textcoords="offset points")
    axes.margins(0.12, 0.2)
    axes.set(xlabel="evaluator's score", ylabel="expert's score", title="Evaluator calibration")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_coverage(x: Sequence[float], y: Sequence[float], selected: Sequence[bool]) -> Figure:
    """The pool on its first two principal components, with the points the expert was asked about."""
    points, chosen = np.column_stack([x, y]), np.asarray(selected, dtype=bool)
    figure, axes = new_figure(5.2, 3.6)
    pool = {"s": 5, "color": MUTED, "linewidths": 0, "rasterized": True}
    axes.scatter(*points[~chosen].T, label=f"pool ({int((~chosen).sum())} shown)", **pool)
    axes.scatter(*points[chosen].T, s=11, color=M2, linewidths=0, label=f"selected ({int(chosen.sum())} shown)")
    axes.set(xlabel="first component", ylabel="second component", title="Coverage of the selected points")
    add_legend(figure, axes, marker_scale=2)
    return figure


@mpl.rc_context(STYLE)
def plot_radius(radius: Sequence[float]) -> Figure:
    """Covering radius (largest distance of a response to its nearest selected one) as the selection grew."""
    figure, axes = new_figure(5.2, 3.6)
    axes.plot(np.linspace(0, 100, len(radius)), radius, color=M2, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="% of the picks", ylabel="covering radius", title="Covering radius during selection")
    return figure


@mpl.rc_context(STYLE)
def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training curves by stage, as read by `read_metrics`: one panel per metric, at most four per stage."""
    panels = [(stage, name) for stage, rows in curves.items() for name in _plotted(rows)]
    num_columns = 4
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(10.6, 2.4 * num_rows), layout="constrained")
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, (stage, name) in zip(grid, panels, strict=False):
        curve = [(row["step"], row[name]) for row in curves[stage] if row.get(name) is not None]
        marker = "." if len(curve) < 30 else None
        axes.plot(*np.array(curve).reshape(-1, 2).T, color=M2, linewidth=1.2, marker=marker)
        axes.set(xlabel="step", title=f"{stage} / {name}")
        axes.locator_params(nbins=4)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _plotted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    logged = list(dict.fromkeys(name for row in rows for name in row))
    others = [name for name in logged if name not in CURVES and name not in UNPLOTTED and not name.endswith("_s")]
    return ([name for name in CURVES if name in logged] + others)[:4]


@mpl.rc_context(STYLE)
def to_svg(figure: Figure) -> str:
    """The figure as one SVG element that loads nothing."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"\A.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def add_legend(figure: Figure, axes: Axes, *, marker_scale: float = 1, num_columns: int = 2) -> None:
    """The legend below the panel, out of the data's way."""
    handles, labels = axes.get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": num_columns, "handletextpad": 0.4}
    figure.legend(handles, labels, markerscale=marker_scale, **place)
