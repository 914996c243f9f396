"""Figures of the second pipeline: what PPO did, where its time went, and what synthetic preference generation accepted.

Plain values in, a matplotlib Figure out, as in `plots`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayrl.report.plots import COLORS, M1, M2, MUTED, PPO, STYLE, add_legend, colors_of, new_figure

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
        for (label, rows), color in zip(curves.items(), colors_of(1 + len(curves))[1:], strict=True):
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
def plot_gamma(
    pairs_by_gamma: Mapping[str, int], gamma: float | None, quality: Mapping[str, Mapping[str, Any] | None]
) -> Figure:
    """Pairs there would be at each gamma, and with how many of them the expert agrees, where it was asked."""
    gammas = sorted(pairs_by_gamma, key=float)
    figure, axes = new_figure(5.2, 3.0)
    pairs = [pairs_by_gamma[g] for g in gammas]
    axes.plot([float(g) for g in gammas], pairs, color=M2, marker="o", markersize=4, label="pairs")
    _mark_gamma(axes, gamma)
    axes.set_ylim(bottom=0)
    axes.set(xlim=(0, 1), xlabel="gamma", ylabel="pairs", title="Pairs accepted at each gamma")
    known = {float(g): estimate for g, estimate in quality.items() if estimate}
    if known:
        beside = axes.twinx()
        beside.grid(visible=False)
        _errorbar(beside, known, color=PPO, label="the expert agrees (right)")
        beside.axhline(0.5, color=MUTED, linewidth=0.8)
        beside.set(ylim=(0, 1), ylabel="share")
        axes.plot([], [], color=PPO, marker="o", markersize=4, label="the expert agrees (right)")
    add_legend(figure, axes)
    return figure


@mpl.rc_context(STYLE)
def plot_tracked(points: Sequence[Mapping[str, Any]], titles: Mapping[str, str], rewards: Mapping[str, str]) -> Figure:
    """Along each PPO, by its KL to M1: the expert's mean score, and how well each reward model orders two answers.

    Args:
        points: as `track_rewards` measures them.
        titles: of the PPOs, by stage.
        rewards: titles of the reward models, by name.
    """
    figure = Figure(figsize=(10.6, 3.2), layout="constrained")
    scores, accuracy = figure.subplots(1, 2)
    ppos = list(dict.fromkeys(point["ppo"] for point in points))
    for ppo, color in zip(ppos, COLORS[3][1:], strict=False):
        along = [point for point in points if point["ppo"] == ppo or not point["step"]]  # all start from M1
        title = titles.get(ppo, ppo)
        of = {point["kl"]: point["expert_score"] for point in along if point["expert_score"]}
        _errorbar(scores, of, color=color, label=title)
        for (reward, name), line in zip(rewards.items(), ("-", "--"), strict=False):
            of = {p["kl"]: p["rewards"][reward]["accuracy"] for p in along if p["rewards"][reward]["accuracy"]}
            _errorbar(accuracy, of, color=color, linestyle=line, label=f"{name} on {title}")
    accuracy.axhline(0.5, color=MUTED, linewidth=0.8)
    scores.set(xlabel="KL to M1, nats", title="The expert's mean score")
    accuracy.set(xlabel="KL to M1, nats", ylim=(0, 1), title="Share of answers ordered as the expert does")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def _errorbar(axes: Axes, estimates: Mapping[float, Mapping[str, Any]], **style: Any) -> None:
    """Means with their standard errors; one observation has none."""
    x = sorted(estimates)
    errors = [min(estimates[at]["standard_error"] or 0.0, 1.0) for at in x]
    axes.errorbar(
        x, [estimates[at]["mean"] for at in x], errors, marker="o", markersize=4, capsize=2, linewidth=1.4, **style
    )


def _mark_gamma(axes: Axes, gamma: float | None) -> None:
    if gamma is not None:
        axes.axvline(gamma, color=PPO, linestyle="--", linewidth=1.2, label=f"this run's gamma, {gamma:g}")
