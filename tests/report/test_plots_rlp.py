"""Figures of the second pipeline draw what they are given."""

import pytest

from rayrl.report import plots_rlp
from rayrl.report.plots import to_svg


def test_both_ppos_are_in_every_panel_and_gaps_are_skipped():
    rows = [{"step": s, "reward": s / 2, "kl": 0.1 * s, "kl_coef": 0.02, "clip_fraction": None} for s in (1, 2, 3)]
    rows[2]["held_out_reward"] = 1.25
    figure = plots_rlp.plot_ppo({"plain PPO": rows, "PPO on the refreshed reward": rows[:2]})
    reward, kl, *_, clip, beside = figure.axes
    assert [line.get_xydata().tolist() for line in reward.lines] == [
        [[1, 0.5], [2, 1], [3, 1.5]],
        [[3, 1.25]],
        [[1, 0.5], [2, 1]],
    ]
    assert (len(kl.lines), len(beside.lines), len(clip.lines)) == (2, 2, 0)


def test_a_run_in_its_first_ppo_has_a_figure():
    assert to_svg(plots_rlp.plot_ppo({"plain PPO": [{"step": 1, "reward": 0.5}], "PPO on the refreshed reward": []}))


def test_the_times_are_stacked():
    times = {"generate_s": 3.0, "reward_s": 1.0, "train_s": 4.0, "sync_s": 0.5}
    axes = plots_rlp.plot_times({"plain PPO": times}).axes[0]
    ends = [bar.get_x() + bar.get_width() for bars in axes.containers for bar in bars]
    assert ends == pytest.approx([3, 4, 8, 8.5])


def test_confidences_are_drawn_in_their_bins():
    axes = plots_rlp.plot_confidences({"1.0": 2, "0.5": 7}, 0.5).axes[0]
    bars = [(round(bar.get_x() + bar.get_width() / 2, 2), bar.get_height()) for bar in axes.containers[0]]
    assert bars == [(0.45, 7), (0.95, 2)]
    assert axes.lines[0].get_xdata()[0] == 0.5


def test_pairs_at_each_gamma():
    axes = plots_rlp.plot_gamma({"0.5": 3, "0.0": 9}, None, {}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 9], [0.5, 3]]


def test_the_quality_of_pairs_stands_beside_their_number():
    quality = {"0.5": {"mean": 0.8, "standard_error": 0.1}, "0.0": {"mean": 0.6, "standard_error": 0.05}, "1.0": None}
    _, beside = plots_rlp.plot_gamma({"0.5": 3, "0.0": 9}, None, quality).axes
    assert beside.lines[0].get_xydata().tolist() == [[0, 0.6], [0.5, 0.8]]


def test_both_ppos_are_tracked_from_m1_on():
    def point(ppo, step, kl, r, refreshed):
        rewards = {
            name: {"accuracy": a and {"mean": a, "standard_error": 0.1}}
            for name, a in (("r", r), ("refreshed", refreshed))
        }
        return {
            "ppo": ppo,
            "step": step,
            "kl": kl,
            "expert_score": {"mean": kl, "standard_error": None},
            "rewards": rewards,
        }

    points = [point("ppo", 0, 0.0, 0.7, 0.6), point("ppo", 8, 3.0, 0.5, None), point("ppo_refreshed", 8, 2.0, 0.6, 0.8)]
    scores, accuracy = plots_rlp.plot_tracked(points, {"ppo": "PPO"}, {"r": "r", "refreshed": "r^"}).axes
    drawn = [container.lines[0].get_xydata().tolist() for container in scores.containers]
    assert drawn == [[[0, 0], [3, 3]], [[0, 0], [2, 2]]]
    drawn = [container.lines[0].get_xydata().tolist() for container in accuracy.containers]
    assert drawn == [[[0, 0.7], [3, 0.5]], [[0, 0.6]], [[0, 0.7], [2, 0.6]], [[0, 0.6], [2, 0.8]]]
