"""Figures draw what they are given and load nothing."""

import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

from rayrl.algorithms.estimate import CalibrationBin, Estimate
from rayrl.algorithms.meter import BandPoint, LabelMeter, Measured
from rayrl.report import plots
from rayrl.runs.stage_metrics import TrackedPoint, TrackedReward
from tests.report.made_up_runs import ppo_metrics

BINS = [
    CalibrationBin(low=0, high=1, num=4, mean_predicted=0.5, mean_oracle=0.7),
    CalibrationBin(low=2, high=3, num=9, mean_predicted=2.5, mean_oracle=2.2),
]


def test_scores_are_shares_of_each_policy():
    figure = plots.plot_scores({"M1": [0, 0, 1, 1], "M2": [1, 1]})
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[50, 50], [0, 100]]


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.25, 0.75, 0.3], [0.5, 0.5]])
def test_scores_of_any_kind_lose_no_response(scores):
    figure = plots.plot_scores({"M1": scores, "plain PPO": scores, "RLP": scores})
    assert sum(bar.get_height() for bar in figure.axes[0].containers[0]) == pytest.approx(100)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 20])
def test_every_policy_has_a_color(num):
    colors = plots.colors_of(num)
    assert len(colors) == num and colors[0] == plots.M1


def test_paid_scores_are_in_numeric_order():
    figure = plots.plot_paid_scores({"10": 1, "2": 3})
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == [3, 1]


def test_calibration_draws_a_point_per_bin():
    points = plots.plot_calibration(BINS).axes[0].collections[0].get_offsets()
    assert np.asarray(points).tolist() == [[0.5, 0.7], [2.5, 2.2]]


def test_a_learning_curve_has_its_points_its_bands_and_the_labels_so_far():
    bands = [
        BandPoint(num_labels=at, agreement=0.7, low=0.65, high=0.75, new_low=0.6, new_high=0.8) for at in (10.0, 400.0)
    ]
    points = [Measured(num_labels=at, agreement=0.7, standard_error=0.02) for at in (10, 40)]
    meter = LabelMeter(compares=False, num_labels=100, num_prompts=90, family="power law", band=bands, measured=points)
    axes = plots.plot_learning_curve(meter).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "20", "50", "100", "200"]
    (measured,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert np.asarray(measured.get_xdata()).tolist() == [10, 40]
    assert len(axes.collections) >= 2 and "100 labels so far" in axes.get_legend_handles_labels()[1]


def test_coverage_separates_the_selected():
    axes = plots.plot_coverage([0, 1, 2], [0, 1, 2], [False, True, False]).axes[0]
    assert [len(group.get_offsets()) for group in axes.collections] == [2, 1]


def test_curves_skip_what_is_not_learning_and_survive_gaps():
    rows = [
        {"step": 1, "loss": None, "learning_rate": 1.0, "step_s": 2.0, "num_skipped": 0.0},
        {"step": 2, "loss": 0.5, "margin": 1.0, "num_skipped": 0.0},
    ]
    figure = plots.plot_curves({"sft": [], "dpo": rows})
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles == [
        "dpo / loss",
        "dpo / margin",
    ]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[2, 0.5]]
    skipped = plots.plot_curves({"dpo": [{"step": 1, "num_skipped": 0.0}, {"step": 2, "num_skipped": 1.0}]})
    assert skipped.axes[0].lines[0].get_xydata().tolist() == [[1, 0], [2, 1]]


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


def test_both_ppos_are_in_every_panel_and_gaps_are_skipped():
    rows = [{"step": s, "reward": s / 2, "kl": 0.1 * s, "kl_coef": 0.02, "clip_fraction": None} for s in (1, 2, 3)]
    rows[2]["held_out_reward"] = 1.25
    figure = plots.plot_ppo({"plain PPO": rows, "PPO on the refreshed reward": rows[:2]})
    reward, kl, *_, clip, beside = figure.axes
    assert [line.get_xydata().tolist() for line in reward.lines] == [
        [[1, 0.5], [2, 1], [3, 1.5]],
        [[3, 1.25]],
        [[1, 0.5], [2, 1]],
    ]
    assert (len(kl.lines), len(beside.lines), len(clip.lines)) == (2, 2, 0)


def test_ppo_without_a_value_function_has_no_panel_of_its_loss():
    row = {"step": 1, "reward": 0.5, "kl": 0.0, "kl_coef": 0.02, "policy_loss": 0.1}
    titles = [
        [axes.get_title(loc="left") for axes in plots.plot_ppo({"PPO": [row | more]}).axes]
        for more in ({}, {"value_loss": 1.0})
    ]
    assert ["value loss" in found for found in titles] == [False, True]


def test_a_run_in_its_first_ppo_has_a_figure():
    assert plots.to_svg(plots.plot_ppo({"plain PPO": [{"step": 1, "reward": 0.5}], "PPO on the refreshed reward": []}))


def test_the_times_are_stacked():
    times = replace(ppo_metrics(1.0, 1.0), generate_s=3.0, reward_s=1.0, train_s=4.0, sync_s=0.5)
    axes = plots.plot_times({"plain PPO": times}).axes[0]
    ends = [bar.get_x() + bar.get_width() for bars in axes.containers for bar in bars]
    assert ends == pytest.approx([3, 4, 8, 8.5])


def test_confidences_are_drawn_in_their_bins():
    axes = plots.plot_confidences({"1.0": 2, "0.5": 7}, 0.5).axes[0]
    bars = [(round(bar.get_x() + bar.get_width() / 2, 2), bar.get_height()) for bar in axes.containers[0]]
    assert bars == [(0.45, 7), (0.95, 2)]
    assert axes.lines[0].get_xdata()[0] == 0.5


def test_pairs_at_each_gamma():
    axes = plots.plot_gamma({"0.5": 3, "0.0": 9}, None, {}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 9], [0.5, 3]]


def test_the_quality_of_pairs_stands_beside_their_number():
    quality = {"0.5": Estimate(0.8, 0.1, 25), "0.0": Estimate(0.6, 0.05, 50), "1.0": None}
    _, beside = plots.plot_gamma({"0.5": 3, "0.0": 9}, None, quality).axes
    assert beside.lines[0].get_xydata().tolist() == [[0, 0.6], [0.5, 0.8]]


def test_both_ppos_are_tracked_from_m1_on():
    def point(ppo, step, kl, r, refreshed):
        rewards = {
            name: TrackedReward(mean=None, accuracy=share and Estimate(share, 0.1, 12), spearman=None)
            for name, share in (("r", r), ("refreshed", refreshed))
        }
        return TrackedPoint(ppo=ppo, step=step, kl=kl, oracle_score=Estimate(kl, math.inf, 1), rewards=rewards)

    points = [point("ppo", 0, 0.0, 0.7, 0.6), point("ppo", 8, 3.0, 0.5, None), point("ppo_refreshed", 8, 2.0, 0.6, 0.8)]
    scores, accuracy = plots.plot_tracked(points, {"ppo": "PPO"}, {"r": "r", "refreshed": "r^"}).axes
    drawn = [container.lines[0].get_xydata().tolist() for container in scores.containers]
    assert drawn == [[[0, 0], [3, 3]], [[0, 0], [2, 2]]]
    drawn = [container.lines[0].get_xydata().tolist() for container in accuracy.containers]
    assert drawn == [[[0, 0.7], [3, 0.5]], [[0, 0.6]], [[0, 0.7], [2, 0.6]], [[0, 0.6], [2, 0.8]]]
