"""Comparison of a study's arms, on made-up results whose answers are known."""

import math
from dataclasses import replace

import pytest

from rayrl.study.comparison import Comparison
from rayrl.study.config import load_study
from rayrl.study.page import bounded, render_page
from rayrl.study.results import Cell, Measured, Outcome, estimated
from tests.study.made_up import write_study

PROMPTS = [f"p{i}" for i in range(20)]
BUDGETS = (10, 20, 40)


def study_of(folder, *overrides):
    return load_study(write_study(folder), ["budgets=[10,20,40]", "seeds=[0,1,2,3]", *overrides])


def outcome(arm, budget, seed, value, measure="pair_accuracy", point=()):
    """A cell whose value is about the same on every prompt and with every seed."""
    values = {p: value + 0.002 * math.sin(i + seed) for i, p in enumerate(PROMPTS)}
    cell = Cell(arm=arm, budget=budget, seed=seed, point=point)
    return Outcome(cell=cell, key=f"{arm}{budget}{seed}{point}", measured=[estimated(measure, values)])


def outcomes(curves, *, seeds=range(4), everything=0.9, nothing=0.5):
    found = []
    for seed in seeds:
        found += [outcome("everything", 0, seed, everything), outcome("no labels", 0, seed, nothing)]
        for arm, curve in curves.items():
            found += [outcome(arm, budget, seed, value) for budget, value in zip(BUDGETS, curve, strict=True)]
    return found


# Shares of the reachable 0.4: random 25%, 50%, 100%, k_center 50%, 100%, 100%.
BETTER = {"random": (0.6, 0.7, 0.9), "k_center": (0.7, 0.9, 0.9)}


def test_a_better_strategy_is_named_with_its_labels(tmp_path):
    comparison = Comparison(study_of(tmp_path), outcomes(BETTER))
    by_budget = {each.budget: each for each in comparison.differences}
    assert by_budget[10].difference.mean == pytest.approx(0.1)
    assert by_budget[None].difference.mean == pytest.approx(0.1)  # of 0.1, 0.2 and 0
    assert by_budget[None].is_told_apart and not by_budget[40].is_told_apart
    assert comparison.ranks == {"random": pytest.approx(11 / 6), "k_center": pytest.approx(7 / 6)}
    needed = {(each.arm, each.share): each for each in comparison.needed}
    assert needed["random", 0.8].labels == pytest.approx(20 + 20 * 0.3 / 0.5, abs=0.1)
    assert needed["k_center", 0.8].labels == pytest.approx(10 + 10 * 0.3 / 0.5, abs=0.1)
    assert needed["k_center", 0.8].ratio == pytest.approx(32 / 16, abs=0.02)
    assert needed["k_center", 0.8].ratio_low == pytest.approx(2, abs=0.05)
    assert comparison.conclusion.startswith("Take k_center: over all budgets it is better than random by 0.1")
    assert "k_center needs 18 labels for 90%" in comparison.conclusion
    assert ", random 2 times as many" in comparison.conclusion


def test_equal_strategies_are_not_told_apart(tmp_path):
    same = {"random": BETTER["random"], "k_center": BETTER["random"]}
    comparison = Comparison(study_of(tmp_path), outcomes(same))
    assert comparison.conclusion.startswith("No strategy is told apart from random for the better")
    assert comparison.ranks == {"random": 1.5, "k_center": 1.5}


def test_of_a_regret_less_is_better(tmp_path):
    found = []
    for seed in range(4):
        for arm, values in (("everything", [0.1]), ("no labels", [0.9])):
            found.append(outcome(arm, 0, seed, values[0], "regret"))
        for arm, curve in (("random", (0.7, 0.5, 0.1)), ("k_center", (0.5, 0.1, 0.1))):
            found += [outcome(arm, b, seed, v, "regret") for b, v in zip(BUDGETS, curve, strict=True)]
    comparison = Comparison(study_of(tmp_path, 'measures=["regret"]'), found)
    assert comparison.conclusion.startswith("Take k_center")
    assert comparison.ranks["k_center"] < comparison.ranks["random"]
    needed = {(each.arm, each.share): each.labels for each in comparison.needed}
    assert needed["k_center", 0.8] == pytest.approx(16, abs=0.1)


def test_a_share_that_no_budget_reaches_is_more_than_the_largest(tmp_path):
    low = {"random": (0.55, 0.6, 0.65), "k_center": (0.55, 0.6, 0.65)}
    comparison = Comparison(study_of(tmp_path), outcomes(low))
    assert all(math.isinf(each.labels) and math.isnan(each.ratio) for each in comparison.needed)
    assert "random does not reach 90% of what labelling everything gives with 40 labels" in comparison.conclusion


@pytest.mark.parametrize("everything", [0.4, 0.5])
def test_labels_that_gain_nothing_are_told(tmp_path, everything):
    flat = {"random": (0.5, 0.5, 0.5), "k_center": (0.5, 0.5, 0.5)}
    comparison = Comparison(study_of(tmp_path), outcomes(flat, everything=everything))
    assert comparison.needed == []
    assert "Labelling everything is not told apart from no labels" in comparison.conclusion
    assert "Labelling everything is not told apart from no labels" in render_page(comparison).split("Labels needed")[1]


def test_one_seed_has_no_tests_and_no_intervals(tmp_path):
    study = study_of(tmp_path, "seeds=[0]", "intervals=false")
    comparison = Comparison(study, outcomes(BETTER, seeds=[0]))
    assert comparison.differences == [] and all(math.isnan(each.low) for each in comparison.needed)
    assert comparison.conclusion.startswith("Nothing is tested")
    assert "1 seeds are few" in render_page(comparison)


def test_points_of_the_grid_are_compared_apart(tmp_path):
    study = study_of(tmp_path, "grid.select.num_heads=[10,20]", "budgets=[10]")
    points = study.points()
    found = [
        outcome(arm, 10, seed, 0.6 + 0.1 * number * (arm == "k_center"), point=point)
        for seed in range(4)
        for number, point in enumerate(points)
        for arm in study.arms
    ]
    comparison = Comparison(study, found)
    assert [(each.point, round(each.difference.mean, 6)) for each in comparison.differences] == [
        (points[0], 0.0),
        (points[1], 0.1),
    ]
    page = render_page(comparison)
    assert "select.num_heads = 20" in page


def at_points(points, curves_by_point):
    """Cells at several points of the grid, controls included."""
    return [
        replace(each, cell=replace(each.cell, point=point), key=f"{each.key}{point}")
        for point, curves in zip(points, curves_by_point, strict=True)
        for each in outcomes(curves)
    ]


def test_labels_are_told_of_the_point_at_which_the_strategy_is_better(tmp_path):
    study = study_of(tmp_path, "grid.select.num_heads=[10,20]")
    same = {"random": BETTER["random"], "k_center": BETTER["random"]}
    much_better = {"random": BETTER["random"], "k_center": (0.8, 0.9, 0.9)}
    comparison = Comparison(study, at_points(study.points(), [same, much_better]))
    assert comparison.conclusion.startswith("Take k_center: over all budgets, select.num_heads = 20 it is better")
    # 75% with 10 labels, and 100% with 20; at the other point it needs 36.
    assert "k_center, select.num_heads = 20 needs 16 labels for 90%" in comparison.conclusion


def test_without_a_better_strategy_labels_are_told_of_every_point(tmp_path):
    study = study_of(tmp_path, "grid.select.num_heads=[10,20]")
    first, second = BETTER["random"], (0.55, 0.6, 0.65)
    points = [{"random": curve, "k_center": curve} for curve in (first, second)]
    _, *lines = Comparison(study, at_points(study.points(), points)).conclusion.splitlines()
    assert [line[:60] for line in lines] == [
        "random, select.num_heads = 10 needs 36 labels for 90% of wha",
        "random, select.num_heads = 20 does not reach 90% of what lab",
    ]


def test_a_seed_without_one_of_the_controls_is_left_out_of_labels_needed(tmp_path):
    study = study_of(tmp_path)
    whole = Comparison(study, outcomes(BETTER))
    failing = [each for each in outcomes(BETTER) if (each.cell.arm, each.cell.seed) != ("no labels", 1)]
    comparison = Comparison(study, failing)
    assert comparison.conclusion.startswith("Take k_center")
    expected = [each.labels for each in whole.needed]
    assert [each.labels for each in comparison.needed] == pytest.approx(expected, abs=0.2)
    assert render_page(comparison)

    # Without the control in any seed nothing is told, and no floor is made up.
    none = Comparison(study, [each for each in outcomes(BETTER) if each.cell.arm != "no labels"])
    assert none.needed == [] and "needs" not in none.conclusion


def test_a_share_of_the_ceiling_needs_both_controls(tmp_path):
    study = study_of(tmp_path, "budgets=[10]")
    found = [each for each in outcomes(BETTER) if each.cell.budget in (0, 10)]
    assert ">25%<" in render_page(Comparison(study, found))
    found = [each for each in found if each.cell.arm != "no labels"]
    page = render_page(Comparison(study, found))
    assert ">67%<" not in page and ">25%<" not in page


def test_resamples_in_which_nobody_reaches_the_target_widen_the_ratio(tmp_path):
    # Two seeds reach 80% with either strategy, the other two with none, and so do some resamples.
    found = outcomes({"random": (0.6, 0.7, 0.9), "k_center": (0.7, 0.9, 0.9)}, seeds=range(2))
    found += outcomes({"random": (0.5, 0.5, 0.5), "k_center": (0.5, 0.5, 0.5)}, seeds=range(2, 4))
    comparison = Comparison(study_of(tmp_path), found)
    needed = {(each.arm, each.share): each for each in comparison.needed}["k_center", 0.8]
    assert (needed.ratio_low, needed.ratio_high) == (-math.inf, math.inf)
    assert bounded(1.5, -math.inf, math.inf, ".2f") == "1.50 [0.00, >]"


def test_a_measure_without_prompts_has_the_errors_of_its_seeds(tmp_path):
    study = study_of(tmp_path)
    kl = [Measured(measure="kl", mean=mean, standard_error=0.3, num=50) for mean in (1.0, 3.0)]
    cells = {seed: {"kl": each} for seed, each in enumerate(kl)}
    mean = Comparison(study, []).mean_of(cells, "kl")
    assert mean is not None
    assert (mean.mean, mean.seed_error) == (2.0, pytest.approx(1.0))
    # Seeds may share their prompts: two seeds tell no more of these than one.
    assert (mean.prompt_error, mean.num_prompts) == (pytest.approx(0.3), 50)
