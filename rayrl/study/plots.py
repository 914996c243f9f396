"""Figures of a study: label-efficiency curves, means, and gold scores along PPO, in the style of the report's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayrl.algorithms.overoptimisation import GoldCurve, Turn
from rayrl.algorithms.study_statistics import SeedsMean
from rayrl.report.plots import INK, M1, M2, MORE, PPO, STYLE, add_legend, new_figure

COLORS = (M2, PPO, *MORE)
LINES = ("-", "--", ":", "-.")
"""Of further arms, once the colors are used up."""
LOG_FROM = 8.0
"""Budgets whose largest is so many times the smallest are drawn on a logarithmic axis."""


@mpl.rc_context(STYLE)
def plot_efficiency(
    curves: Mapping[str, Mapping[int, SeedsMean]],
    controls: Mapping[str, SeedsMean],
    *,
    baseline: str,
    measure: str,
    title: str,
) -> Figure:
    """Draw a measure against the number of labels, an arm a line, with a band of one standard error over seeds.

    Args:
        curves: by arm and budget.
        controls: levels that do not depend on the budget, by name.
        baseline: the arm that the others are compared with; drawn in grey.
        measure: name of the measure, for the axis.
        title: of the figure.
    """
    figure, axes = new_figure(10.6, 4.6)
    for number, (name, level) in enumerate(controls.items()):
        label = f"{name}, {level.mean:.3f}"  # which may be beyond the axis
        axes.axhline(level.mean, color=M1, linewidth=1.2, linestyle=LINES[(number + 1) % len(LINES)], label=label)
    others = 0
    for name, curve in curves.items():
        if name == baseline:
            style: dict[str, Any] = {"color": INK, "linewidth": 2.0}
        else:
            style = {"color": COLORS[others % len(COLORS)], "linestyle": LINES[others // len(COLORS) % len(LINES)]}
            others += 1
        draw_band(axes, curve, name, style)
    budgets = sorted({budget for curve in curves.values() for budget in curve})
    _fit_axis(axes, curves, controls)
    if budgets and budgets[-1] >= LOG_FROM * budgets[0]:
        axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    axes.set(xlabel="labels", ylabel=measure, title=title)
    add_legend(figure, axes, num_columns=4)
    return figure


def _fit_axis(axes: Axes, curves: Mapping[str, Mapping[int, SeedsMean]], controls: Mapping[str, SeedsMean]) -> None:
    """Show the curves and what lies next to them: a control far away would flatten them."""
    means = [mean for curve in curves.values() for mean in curve.values()]
    if not means:
        return
    ends = [
        mean.mean + sign * (mean.seed_error if math.isfinite(mean.seed_error) else 0)
        for mean in means
        for sign in (-1, 1)
    ]
    low, high = min(ends), max(ends)
    room = max((high - low) / 2, 1e-3)
    near = [level.mean for level in controls.values() if low - room < level.mean < high + room]
    low, high = min([low, *near]), max([high, *near])
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def draw_band(axes: Axes, curve: Mapping[int, SeedsMean], name: str, style: Mapping[str, Any]) -> None:
    """Draw one curve with its band."""
    budgets = sorted(curve)
    means = [curve[budget].mean for budget in budgets]
    errors = [error if math.isfinite(error := curve[budget].seed_error) else 0.0 for budget in budgets]
    axes.plot(budgets, means, marker="o", markersize=3.5, label=name, **{"linewidth": 1.4, **style})
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(budgets, low, high, color=style["color"], alpha=0.12, linewidth=0)


@mpl.rc_context(STYLE)
def plot_means(means: Mapping[str, SeedsMean], *, baseline: str, measure: str, title: str) -> Figure:
    """Draw a measure of every arm, with a bar of one standard error over seeds, where there is one budget."""
    figure, axes = new_figure(10.6, 0.9 + 0.34 * len(means))
    names: Sequence[str] = list(means)
    for place, name in enumerate(names):
        mean = means[name]
        error = mean.seed_error if math.isfinite(mean.seed_error) else 0.0
        color = M1 if name == baseline else M2
        axes.errorbar([mean.mean], [place], xerr=[error], marker="o", markersize=5, capsize=3, color=color)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=measure, title=title)
    return figure


@dataclass(frozen=True, kw_only=True)
class GoldLine:
    """One row of a study in the figure of gold scores along PPO."""

    seeds: Sequence[Sequence[tuple[float, float]]]
    """Measured points of each seed: distance from M1 in root nats, and gold score less M1's."""
    curve: GoldCurve
    """The mean of the fits."""
    turn: Turn


NUM_GOLD_COLUMNS = 3


@mpl.rc_context(STYLE)
def plot_gold(lines: Mapping[str, GoldLine], *, baseline: str) -> Figure:
    """Draw the gold score against the root of the KL to M1, a panel for each row on the same axes.

    Args:
        lines: by name of the row.
        baseline: the row whose fit every panel shows in grey.
    """
    num_rows = -(-len(lines) // NUM_GOLD_COLUMNS)
    figure = Figure(figsize=(10.6, 0.4 + 2.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, NUM_GOLD_COLUMNS, sharex=True, sharey=True, squeeze=False)
    farthest = max(distance for line in lines.values() for seed in line.seeds for distance, _ in seed)
    for axes, (name, line) in zip(grid.flat, lines.items(), strict=False):
        if baseline in lines and name != baseline:
            _draw_fit(axes, lines[baseline], color=M1, linewidth=1.0)
        for seed in line.seeds:
            axes.plot(*zip(*seed, strict=True), color=M2, linewidth=0.5, marker="o", markersize=2.5, alpha=0.55)
        _draw_fit(axes, line, color=INK, linewidth=1.8)
        turn = line.turn
        if turn.root_kl <= farthest:
            axes.axvline(turn.root_kl, color=PPO, linestyle="--", linewidth=1.2)
            if math.isfinite(turn.low):
                axes.axvspan(turn.low, min(turn.high, farthest), color=PPO, alpha=0.12, linewidth=0)
        axes.set_title(name, fontsize=8)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(lines))
        axes.tick_params(labelbottom=number + NUM_GOLD_COLUMNS >= len(lines))  # the lowest panel of each column
    figure.supxlabel("root of KL to M1, root nats", fontsize=9)
    figure.supylabel("gold score less M1's", fontsize=9)
    return figure


def _draw_fit(axes: Axes, line: GoldLine, *, color: str, linewidth: float) -> None:
    """Draw a fitted curve as far as its seeds reach."""
    reached = max(distance for distance, _ in chain.from_iterable(line.seeds))
    distances = np.linspace(0, reached, 80).tolist()
    axes.plot(distances, [line.curve.at(d) for d in distances], color=color, linewidth=linewidth)
