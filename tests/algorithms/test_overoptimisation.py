"""Curves of a gold score against the distance from M1, whose turning points are known."""

import math

import numpy as np
import pytest

from rayrl.algorithms.overoptimisation import GoldCurve, fit_gold_curve, mean_curve, turning_point

ROOTS = [0.0, 0.3, 0.7, 1.2, 2.0, 3.1, 4.5]


def around(curve, num, spread, seed=0):
    """Curves of seeds about a true one."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal([curve.alpha, curve.beta], spread, (num, 2))
    return [GoldCurve(alpha=alpha, beta=beta) for alpha, beta in drawn.tolist()]


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.4, 0.4), (0.8, -0.2), (-0.3, 0.2)])
def test_a_curve_without_noise_is_found_again(alpha, beta):
    curve = GoldCurve(alpha=alpha, beta=beta)
    found = fit_gold_curve(ROOTS, [curve.at(root) for root in ROOTS])
    assert (found.alpha, found.beta) == (pytest.approx(alpha), pytest.approx(beta))


def test_the_turning_point_is_the_highest_point_of_the_curve():
    curve = GoldCurve(alpha=1.0, beta=0.5)
    assert curve.turn == pytest.approx(math.e)
    distances = np.linspace(0.01, 6, 4000)
    assert distances[np.argmax([curve.at(d) for d in distances])] == pytest.approx(math.e, abs=0.002)
    assert curve.at(0.0) == 0.0 and curve.at(math.exp(2)) == pytest.approx(0)  # where all is lost
    assert GoldCurve(alpha=1.0, beta=0.0).turn == GoldCurve(alpha=1.0, beta=-0.1).turn == math.inf


def test_noise_is_smoothed():
    curve, rng = GoldCurve(alpha=1.0, beta=0.5), np.random.default_rng(0)
    roots = np.linspace(0.2, 5, 40)
    noisy = [curve.at(d) + rng.normal(0, 0.1) for d in roots]
    assert fit_gold_curve(roots, noisy).turn == pytest.approx(math.e, rel=0.1)


@pytest.mark.parametrize("roots", [[], [0.0, 0.0], [0.0, 1.0, 1.0]])
def test_too_few_distances_are_refused(roots):
    with pytest.raises(ValueError, match="two different distances"):
        fit_gold_curve(roots, [0.1] * len(roots))


def test_the_mean_curve_is_the_mean_of_the_scores():
    seeds = [GoldCurve(alpha=1.0, beta=0.5), GoldCurve(alpha=0.5, beta=0.1)]
    assert mean_curve(seeds).at(2.0) == pytest.approx((seeds[0].at(2.0) + seeds[1].at(2.0)) / 2)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    curve = GoldCurve(alpha=1.0, beta=0.5)
    found = [turning_point(around(curve, 5, (0.1, 0.12), seed)) for seed in range(1000)]
    held = np.mean([turn.low <= curve.turn <= turn.high for turn in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)
    assert any(turn.high < math.inf for turn in found)


def test_what_is_not_told_has_no_upper_end():
    one = turning_point([GoldCurve(alpha=1.0, beta=0.5)])
    assert one.root_kl == pytest.approx(math.e) and math.isnan(one.low) and math.isnan(one.high)
    # beta is not told apart from 0, alpha is: below some distance it does not turn.
    rising = turning_point(around(GoldCurve(alpha=1.0, beta=0.0), 5, 0.1))
    assert rising.low > 1 and rising.high == math.inf
    nothing = turning_point(around(GoldCurve(alpha=0.0, beta=0.0), 5, 0.1))
    assert (nothing.low, nothing.high) == (0.0, math.inf)
    never = turning_point(around(GoldCurve(alpha=1.0, beta=-0.5), 5, 0.01))
    assert (never.root_kl, never.low, never.high) == (math.inf, math.inf, math.inf)
    same = turning_point([GoldCurve(alpha=1.0, beta=0.5)] * 3)
    assert (same.low, same.high) == (pytest.approx(math.e), pytest.approx(math.e))
    with pytest.raises(ValueError, match="got none"):
        turning_point([])


def test_a_curve_that_falls_from_the_start_turns_next_to_m1():
    assert GoldCurve(alpha=-1.0, beta=0.1).turn < 1e-4
    flat = [GoldCurve(alpha=1.0, beta=beta) for beta in (1e-4, 1.1e-4, 0.9e-4)]
    assert turning_point(flat).high == math.inf  # beyond what a float holds, and no error
