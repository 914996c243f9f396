"""Agreement of raters, against values computed by hand and published ones."""

import math

import pytest

from rayrl.algorithms.raters import cohen_kappa, interval, krippendorff_alpha, nominal

# Krippendorff (2011), part C: four raters, twelve units, nominal data with missing values.
PUBLISHED = [
    [1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [5, 5, 5], [1, 1], [3],
]  # fmt: skip


def test_alpha_of_published_data():
    assert krippendorff_alpha(PUBLISHED, nominal) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, interval) == pytest.approx(0.849, abs=5e-4)


def test_alpha_by_hand():
    # Values 1, 1, 0, 1: observed (0 + 2) / 4; expected over ordered pairs of different values: 2 * 3 / (4 * 3).
    assert krippendorff_alpha([[1, 1], [0, 1]], nominal) == pytest.approx(1 - (2 / 4) / (6 / 12))
    assert krippendorff_alpha([[1, 1], [3, 3], [2]]) == 1.0
    assert math.isnan(krippendorff_alpha([[1], [2]]))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))


def test_kappa_by_hand():
    # Cohen: agreed 35 of 50; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohen_kappa(["a", "b"], ["a", "b"]) == 1.0
    assert math.isnan(cohen_kappa(["a"], ["a"])) and math.isnan(cohen_kappa([], []))
