"""Figures of the second pipeline: what PPO did, where its time went, and what synthetic preference generation accepted.

Plain values in, a matplotlib Figure out, as in `plots`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayrl.telemetry.plots import COLORS, M1, M2, MUTED, PPO, STYLE, add_legend, new_figure

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
PANELS = {
    "reward": "reward (dashed: held-out prompts)",
    "kl": "KL to M1, nats (dashed: kl_coef, right)",
    "length": "length, tokens",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "clip_fraction": "clip fraction",
}
TIMES = {"generate_s": "generation", "reward_s": "reward", "train_s": "training", "sync_s": "weight sync"}


@mpl.rc_context(STYLE)
def plot_ppo(curves: Curves) -> Figure:
    """Curves of the PPOs, by title, one line each; as read by `read_metrics`."""
    figure = Figure(figsize=(10.6, 5.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        beside = axes.twinx() if name == "kl" else None
        for (label, rows), color in zip(curves.items(), COLORS[3][1:], strict=False):
            _draw(axes, rows, name, color=color, label=label, linewidth=1.4)
            if name == "reward":
                _draw(axes, rows, "held_out_reward", color=color, linestyle="--", marker="o", markersize=3)
            if beside:
                _draw(beside, rows, "kl_coef", color=color, linestyle="--", linewidth=1, alpha=0.6)
        if beside:
            beside.grid(visible=False)
            beside.set_ylim(bottom=0)
        axes.set(xlabel="rollout", title=title)
        axes.locator_params(nbins=5)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    curve = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if curve:
        dots: dict[str, Any] = {"marker": "." if len(curve) < 30 else None}
        axes.plot(*np.array(curve).T, **(dots | style))


@mpl.rc_context(STYLE)
def plot_times(trained: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds of each PPO by what they went into; `trained` are the stages' metrics by title."""
    figure, axes = new_figure(5.2, 2.4)
    titles = list(trained)
    left = np.zeros(len(titles))
    for (name, label), color in zip(TIMES.items(), (M2, PPO, M1, MUTED), strict=True):
        seconds = np.array([trained[title].get(name) or 0.0 for title in titles])
        axes.barh(titles, seconds, 0.55, left=left, color=color, label=label)
        left += seconds
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds", title="Where PPO's time went")
    add_legend(figure, axes, num_columns=4)
    return figure


@mpl.rc_context(STYLE)
def plot_confidences(confidences: Mapping[str, int], gamma: float | None) -> Figure:
    """Prompts by confidence, the share of the samples in the largest cluster; a bin is named by its upper edge."""
    edges = np.array(sorted(map(float, confidences)))
    figure, axes = new_figure(5.2, 3.0)
    axes.bar(edges - 0.05, [confidences[f"{edge:.1f}"] for edge in edges], 0.09, color=M2)
    _mark_gamma(axes, gamma)
    axes.grid(axis="x", visible=False)
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="prompts", title="Confidence of the largest cluster")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_gamma(pairs_by_gamma: Mapping[str, int], gamma: float | None) -> Figure:
    """Pairs there would be at each gamma."""
    gammas = sorted(pairs_by_gamma, key=float)
    figure, axes = new_figure(5.2, 3.0)
    axes.plot([float(g) for g in gammas], [pairs_by_gamma[g] for g in gammas], color=M2, marker="o", markersize=4)
    _mark_gamma(axes, gamma)
    axes.set_ylim(bottom=0)
    axes.set(xlim=(0, 1), xlabel="gamma", ylabel="pairs", title="Pairs accepted at each gamma")
    add_legend(figure, axes)
    return figure


def _mark_gamma(axes: Axes, gamma: float | None) -> None:
    if gamma is not None:
        axes.axvline(gamma, color=PPO, linestyle="--", linewidth=1.2, label=f"this run's gamma, {gamma:g}")
