"""Figures of the report: plain values in, a matplotlib Figure out. No pyplot, no global state, no files.

The notebooks draw the same figures. `to_svg` turns one into text that stands alone. Which figures a run has data for is
decided in `rayrl.report.figures`.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayrl.algorithms.estimate import CalibrationBin, Estimate
from rayrl.algorithms.meter import CHANCE, LabelMeter
from rayrl.runs.stage_metrics import PpoMetrics, TrackedPoint

Row = Mapping[str, float | None]
"""One logged step of a curve: "step" and its values, None where one was not finite."""
Curve = Sequence[Row]

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
CURVES = ("loss", "eval_loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "kl")
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
MAX_PANELS = 4
"""Panels of one training."""
FEW_STEPS = 30
"""A curve of fewer steps has its points marked."""
PPO_PANELS = {
    "reward": "reward (dashed: held-out prompts)",
    "kl": "KL to M1, nats (dashed: kl_coef, right)",
    "length": "length, tokens",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "clip_fraction": "clip fraction",
}
TIMES = {"generate_s": "generation", "reward_s": "reward", "train_s": "training", "sync_s": "weight sync"}
"""Parts of PPO's time: fields of `PpoMetrics`, with their titles."""


class _Line(TypedDict, total=False):
    """Style of a line."""

    color: str
    linestyle: str
    linewidth: float
    marker: str | None
    markersize: float
    alpha: float
    label: str


def colors_of(num: int) -> list[str]:
    """Choose the colors of so many policies, M1 first."""
    known = COLORS.get(num, COLORS[3])
    return list(itertools.islice(itertools.chain(known, itertools.cycle(MORE)), num))


@mpl.rc_context(STYLE)
def plot_scores(policies: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of evaluation responses at each oracle score, by policy."""
    values = np.unique(np.concatenate(list(policies.values())))
    is_discrete = bool(np.all(values == np.round(values)))
    low, high = values[0], values[-1]
    # Twelve edges for scores that are no whole numbers; their range may be a single point.
    edges = np.arange(low - 0.5, high + 1) if is_discrete else np.linspace(low, max(high, low + 1e-6), 12)
    centers, width = (edges[:-1] + edges[1:]) / 2, 0.8 / len(policies) * (edges[1] - edges[0])
    # Long titles need a line each; two fit beside each other where there are few policies.
    num_columns = 2 if len(policies) <= 3 else 1
    num_more = max(0, len(policies) - 3)
    figure, axes = new_figure(5.2, 3.0 + 0.2 * num_more)
    for i, ((name, scores), color) in enumerate(zip(policies.items(), colors_of(len(policies)), strict=True)):
        share = np.histogram(scores, edges)[0] / len(scores)
        offset = (i - (len(policies) - 1) / 2) * width
        label = f"{name}, mean {np.mean(scores):.2f} (n = {len(scores)})"
        axes.bar(centers + offset, 100 * share, width, color=color, label=label)
    if is_discrete:
        axes.set_xticks(centers)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="oracle score", ylabel="% of responses", title="Oracle scores by policy")
    add_legend(figure, axes, num_columns=num_columns)
    return figure


@mpl.rc_context(STYLE)
def plot_paid_scores(histogram: Mapping[str, int]) -> Figure:
    """Draw the number of paid judgements at each score."""
    scores = sorted(histogram, key=float)
    figure, axes = new_figure(5.2, 3.0)
    axes.bar(scores, [histogram[score] for score in scores], 0.6, color=MUTED)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="oracle score", ylabel="paid judgements", title="Scores of the paid judgements")
    return figure


@mpl.rc_context(STYLE)
def plot_calibration(bins: Sequence[CalibrationBin]) -> Figure:
    """Draw the oracle's score against the predicted one, on held-out judgements."""
    predicted = [one.mean_predicted for one in bins]
    oracle = [one.mean_oracle for one in bins]
    figure, axes = new_figure(5.2, 3.0)
    # The diagonal: a calibrated evaluator predicts the oracle's score.
    ends = [min(predicted + oracle), max(predicted + oracle)]
    axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1, label="perfect")
    axes.plot(predicted, oracle, color=M2, linewidth=1, alpha=0.5)
    axes.scatter(predicted, oracle, s=[20 + 4 * one.num for one in bins], color=M2, label="held-out (area: number)")
    for one in bins:
        axes.annotate(str(one.num), (one.mean_predicted, one.mean_oracle), (0, -13), textcoords="offset points")
    axes.margins(0.12, 0.2)
    axes.set(xlabel="evaluator's score", ylabel="oracle's score", title="Evaluator calibration")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_learning_curve(meter: LabelMeter) -> Figure:
    """Draw the agreement by the number of labels: measured, the best curve, and its two bands."""
    labels = [point.num_labels for point in meter.band]
    figure, axes = new_figure(5.2, 3.6)
    new_low, new_high = [point.new_low for point in meter.band], [point.new_high for point in meter.band]
    axes.fill_between(labels, new_low, new_high, color=GRID, linewidth=0, label="90% band of a new measurement")
    low, high = [point.low for point in meter.band], [point.high for point in meter.band]
    axes.fill_between(labels, low, high, color=M2, alpha=0.2, linewidth=0, label="90% band of the curve")
    axes.plot(labels, [point.agreement for point in meter.band], color=M2, linewidth=1.5, label=f"{meter.family}")
    axes.errorbar(
        [point.num_labels for point in meter.measured],
        [point.agreement for point in meter.measured],
        [point.standard_error for point in meter.measured],
        color=INK,
        linestyle="none",
        marker="o",
        markersize=4,
        capsize=2,
        label=f"measured, {meter.num_splits} splits",
    )
    axes.axvline(
        meter.num_labels, color=PPO, linestyle="--", linewidth=1.2, label=f"{meter.num_labels:,} labels so far"
    )
    axes.axhline(CHANCE, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    ticks = _label_ticks(labels[0], labels[-1])
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=meter.unit, ylabel="agreement with the oracle", title="Learning curve of the labels")
    add_legend(figure, axes)
    return figure


def _label_ticks(low: float, high: float) -> list[int]:
    """Choose round numbers between two ends of a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_numbers = [step * 10**power for power in powers for step in (1, 2, 5)]
    return [tick for tick in round_numbers if low <= tick <= high]


@mpl.rc_context(STYLE)
def plot_coverage(x: Sequence[float], y: Sequence[float], selected: Sequence[bool]) -> Figure:
    """Draw the pool on its first two principal components, with the points the oracle was asked about."""
    points, chosen = np.column_stack([x, y]), np.asarray(selected, dtype=bool)
    figure, axes = new_figure(5.2, 3.6)
    # As pixels: thousands of circles would be a large file.
    others = f"pool ({int((~chosen).sum())} shown)"
    axes.scatter(*points[~chosen].T, s=5, color=MUTED, linewidths=0, rasterized=True, label=others)
    axes.scatter(*points[chosen].T, s=11, color=M2, linewidths=0, label=f"selected ({int(chosen.sum())} shown)")
    axes.set(xlabel="first component", ylabel="second component", title="Coverage of the selected points")
    add_legend(figure, axes, marker_scale=2)
    return figure


@mpl.rc_context(STYLE)
def plot_radius(radius: Sequence[float]) -> Figure:
    """Draw the covering radius (largest distance of a response to its nearest selected one) as the selection grew."""
    figure, axes = new_figure(5.2, 3.6)
    # Only about 200 of the radii are kept, evenly spaced: a share of the picks is known, their number is not.
    axes.plot(np.linspace(0, 100, len(radius)), radius, color=M2, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="% of the picks", ylabel="covering radius", title="Covering radius during selection")
    return figure


@mpl.rc_context(STYLE)
def plot_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw training curves by stage, as read by `read_metrics`: one panel per metric, at most four per stage."""
    panels = [(stage, name) for stage, rows in curves.items() for name in _plotted(rows)]
    num_columns = 4
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(10.6, 2.4 * num_rows), layout="constrained")
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, (stage, name) in zip(grid, panels, strict=False):
        _draw(axes, curves[stage], name, color=M2, linewidth=1.2)
        axes.set(xlabel="step", title=f"{stage} / {name}")
        axes.locator_params(nbins=4)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _plotted(rows: Curve) -> list[str]:
    """Choose the metrics of a training that are drawn; skipped steps only if there were any."""
    logged = list(dict.fromkeys(name for row in rows for name, value in row.items() if name != "num_skipped" or value))
    known = [name for name in CURVES if name in logged]
    others = [name for name in logged if name not in CURVES and name not in UNPLOTTED and not name.endswith("_s")]
    return (known + others)[:MAX_PANELS]


@mpl.rc_context(STYLE)
def plot_ppo(curves: Mapping[str, Curve]) -> Figure:
    """Draw the curves of the PPO trainings, by title, one line each; as read by `read_metrics`."""
    figure = Figure(figsize=(10.6, 5.2), layout="constrained")
    panels, places = _ppo_panels(curves), list(figure.subplots(2, 3).flat)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, title) in zip(places, panels.items(), strict=False):
        # The coefficient adapts to the KL, so the two are read together.
        beside = axes.twinx() if name == "kl" else None
        for (label, rows), color in zip(curves.items(), colors_of(1 + len(curves))[1:], strict=True):
            _draw(axes, rows, name, color=color, label=label, linewidth=1.4)
            if name == "reward":
                _draw(axes, rows, "held_out_reward", color=color, linestyle="--", marker="o", markersize=3)
            if beside is not None:
                _draw(beside, rows, "kl_coef", color=color, linestyle="--", linewidth=1, alpha=0.6)
        if beside is not None:
            beside.grid(visible=False)
            beside.set_ylim(bottom=0)
        axes.set(xlabel="rollout", title=title)
        axes.locator_params(nbins=5)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _ppo_panels(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Choose the panels of PPO trainings: without a value function there is no value loss."""
    logged = {name for rows in curves.values() for row in rows for name in row}
    has_value = "value_loss" in logged or "policy_loss" not in logged
    return {name: title for name, title in PPO_PANELS.items() if has_value or name != "value_loss"}


def _draw(axes: Axes, rows: Curve, name: str, **style: Unpack[_Line]) -> None:
    """Draw one metric of a curve over its steps, without the steps that lack it."""
    steps: list[float] = []
    values: list[float] = []
    for row in rows:
        step, value = row["step"], row.get(name)
        if step is not None and value is not None:
            steps.append(step)
            values.append(value)
    if steps:
        line: _Line = {"marker": "." if len(steps) < FEW_STEPS else None}
        line.update(style)
        axes.plot(steps, values, **line)


@mpl.rc_context(STYLE)
def plot_times(trained: Mapping[str, PpoMetrics]) -> Figure:
    """Draw the seconds of each PPO, by title, and what they went into."""
    figure, axes = new_figure(5.2, 2.4)
    titles = list(trained)
    left = np.zeros(len(titles))  # where the next part of each bar begins
    for (name, label), color in zip(TIMES.items(), (M2, PPO, M1, MUTED), strict=True):
        seconds = np.array([float(getattr(metrics, name)) for metrics in trained.values()])
        axes.barh(titles, seconds, 0.55, left=left, color=color, label=label)
        left += seconds
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds", title="Where PPO's time went")
    add_legend(figure, axes, num_columns=4)
    return figure


@mpl.rc_context(STYLE)
def plot_confidences(confidences: Mapping[str, int], gamma: float | None) -> Figure:
    """Draw prompts by confidence, the share of the samples in the largest cluster; a bin is named by its upper edge."""
    edges = np.array(sorted(map(float, confidences)))
    figure, axes = new_figure(5.2, 3.0)
    # Bins are a tenth wide and named by their right end.
    axes.bar(edges - 0.05, [confidences[f"{edge:.1f}"] for edge in edges], 0.09, color=M2)
    _mark_gamma(axes, gamma)
    axes.grid(axis="x", visible=False)
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="prompts", title="Confidence of the largest cluster")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_gamma(
    pairs_by_gamma: Mapping[str, int], gamma: float | None, quality: Mapping[str, Estimate | None]
) -> Figure:
    """Draw the pairs there would be at each gamma, and with how many of them the oracle agrees, where it was asked."""
    gammas = sorted(pairs_by_gamma, key=float)
    figure, axes = new_figure(5.2, 3.0)
    pairs = [pairs_by_gamma[each] for each in gammas]
    axes.plot([float(each) for each in gammas], pairs, color=M2, marker="o", markersize=4, label="pairs")
    _mark_gamma(axes, gamma)
    axes.set_ylim(bottom=0)
    axes.set(xlim=(0, 1), xlabel="gamma", ylabel="pairs", title="Pairs accepted at each gamma")
    known = {float(each): estimate for each, estimate in quality.items() if estimate is not None}
    if known:
        beside = axes.twinx()
        beside.grid(visible=False)
        _errorbar(beside, known, color=PPO, label="the oracle agrees (right)")
        beside.axhline(0.5, color=MUTED, linewidth=0.8)
        beside.set(ylim=(0, 1), ylabel="share")
        # An empty line, for the legend: that is of the other axes.
        axes.plot([], [], color=PPO, marker="o", markersize=4, label="the oracle agrees (right)")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_tracked(points: Sequence[TrackedPoint], titles: Mapping[str, str], rewards: Mapping[str, str]) -> Figure:
    """Draw, along each PPO by its KL to M1, the oracle's mean score, and how well each reward orders two answers.

    Args:
        points: as `track_rewards` measures them.
        titles: of the PPO trainings, by stage.
        rewards: titles of the rewards, by name.
    """
    figure = Figure(figsize=(10.6, 3.2), layout="constrained")
    scores, accuracy = figure.subplots(1, 2)
    ppos = list(dict.fromkeys(point.ppo for point in points))
    for ppo, color in zip(ppos, COLORS[3][1:], strict=False):
        along = [point for point in points if point.ppo == ppo or point.step == 0]  # all start from M1
        title = titles.get(ppo, ppo)
        measured = {point.kl: point.oracle_score for point in along}
        _errorbar(scores, _known(measured), color=color, label=title)
        for (reward, name), line in zip(rewards.items(), ("-", "--"), strict=False):
            measured = {point.kl: point.rewards[reward].accuracy for point in along}
            _errorbar(accuracy, _known(measured), color=color, linestyle=line, label=f"{name} on {title}")
    accuracy.axhline(0.5, color=MUTED, linewidth=0.8)
    scores.set(xlabel="KL to M1, nats", title="The oracle's mean score")
    accuracy.set(xlabel="KL to M1, nats", ylim=(0, 1), title="Share of answers ordered as the oracle does")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def _known(estimates: Mapping[float, Estimate | None]) -> dict[float, Estimate]:
    return {at: estimate for at, estimate in estimates.items() if estimate is not None}


def _errorbar(axes: Axes, estimates: Mapping[float, Estimate], *, color: str, label: str, linestyle: str = "-") -> None:
    """Draw means with their standard errors; a single observation has none."""
    x = sorted(estimates)
    means = [estimates[at].mean for at in x]
    errors = [estimates[at].standard_error for at in x]
    # At most 1: a longer bar would hide the rest of the figure.
    lengths = [min(error, 1.0) if math.isfinite(error) else 0.0 for error in errors]
    axes.errorbar(
        x,
        means,
        lengths,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.4,
        color=color,
        linestyle=linestyle,
        label=label,
    )


def _mark_gamma(axes: Axes, gamma: float | None) -> None:
    if gamma is not None:
        axes.axvline(gamma, color=PPO, linestyle="--", linewidth=1.2, label=f"this run's gamma, {gamma:g}")


@mpl.rc_context(STYLE)
def to_svg(figure: Figure) -> str:
    """Write the figure as one SVG element that loads nothing."""
    buffer = io.StringIO()
    # Without date and version the same figure is the same bytes.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # The XML declaration and the doctype name a file on the web.
    return re.sub(r"\A.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one panel, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def add_legend(figure: Figure, axes: Axes, *, marker_scale: float = 1, num_columns: int = 2) -> None:
    """Put the legend below the panel, out of the data's way."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, markerscale=marker_scale, loc="outside lower left", ncols=num_columns, handletextpad=0.4
    )
