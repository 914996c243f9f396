"""Figures draw what they are given and load nothing."""

import matplotlib
import numpy as np
import pytest

from rayrl.report import plots

BINS = [
    {"low": 0, "high": 1, "num": 4, "mean_predicted": 0.5, "mean_expert": 0.7},
    {"low": 1, "high": 2, "num": 0, "mean_predicted": None, "mean_expert": None},
    {"low": 2, "high": 3, "num": 9, "mean_predicted": 2.5, "mean_expert": 2.2},
]


def test_scores_are_shares_of_each_policy():
    figure = plots.plot_scores({"M1": [0, 0, 1, 1], "M2": [1, 1]})
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[50, 50], [0, 100]]


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.25, 0.75, 0.3], [0.5, 0.5]])
def test_scores_of_any_kind_lose_no_response(scores):
    figure = plots.plot_scores({"M1": scores, "plain PPO": scores, "RLP": scores})
    assert sum(bar.get_height() for bar in figure.axes[0].containers[0]) == pytest.approx(100)


def test_paid_scores_are_in_numeric_order():
    figure = plots.plot_paid_scores({"10": 1, "2": 3})
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == [3, 1]


def test_calibration_leaves_out_empty_bins():
    points = plots.plot_calibration(BINS).axes[0].collections[0].get_offsets()
    assert np.asarray(points).tolist() == [[0.5, 0.7], [2.5, 2.2]]


def test_coverage_separates_the_selected():
    axes = plots.plot_coverage([0, 1, 2], [0, 1, 2], [False, True, False]).axes[0]
    assert [len(group.get_offsets()) for group in axes.collections] == [2, 1]


def test_curves_skip_what_is_not_learning_and_survive_gaps():
    rows = [
        {"step": 1, "loss": None, "learning_rate": 1.0, "step_s": 2.0},
        {"step": 2, "loss": 0.5, "margin": 1.0},
    ]
    figure = plots.plot_curves({"sft": [], "dpo": rows})
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles == [
        "dpo / loss",
        "dpo / margin",
    ]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[2, 0.5]]


def test_svg_is_one_element_and_the_same_every_time():
    first, second = (plots.to_svg(plots.plot_radius([3.0, 2.0, 1.0])) for _ in range(2))
    assert first == second
    assert first.startswith("<svg") and first.rstrip().endswith("</svg>")
    assert "<script" not in first


def test_text_with_dollars_and_tags_is_drawn_as_it_is():
    svg = plots.to_svg(plots.plot_curves({"dpo": [{"step": 1, "$x^$ <b>": 1.0}]}))
    assert "$x^$ &lt;b&gt;" in svg


def test_drawing_leaves_the_users_style_alone():
    before = {name: matplotlib.rcParams[name] for name in plots.STYLE}
    plots.to_svg(plots.plot_radius([2.0, 1.0]))
    assert {name: matplotlib.rcParams[name] for name in plots.STYLE} == before
