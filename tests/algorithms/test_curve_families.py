"""Fits of learning curves: known answers are found, and intervals hold as often as they promise."""

import numpy as np
import pytest

from rayrl.algorithms.curve_families import CurveFit, fit_curves
from rayrl.algorithms.meter import CHANCE

SIZES = np.array([20, 29, 43, 63, 93, 138, 203, 300])
NUM_TRIALS = 50
POWER_LAW, EXPONENTIAL = "power law", "exponential"
CURVES = {
    POWER_LAW: (lambda n: 0.8 - 0.9 * n**-0.5, 0.8, lambda share: (0.9 / ((1 - share) * 0.3)) ** 2),
    EXPONENTIAL: (
        lambda n: 0.75 - 0.2 * np.exp(-n / 100),
        0.75,
        lambda share: -100 * np.log((1 - share) * 0.25 / 0.2),
    ),
}


def covariance(error: float) -> np.ndarray:
    """Errors of one level, which all sizes share, and some of each size."""
    own = 0.6 * error * np.sqrt(SIZES[-1] / SIZES)
    return error**2 + np.diag(own**2)


def draws(curve, error: float, num: int = NUM_TRIALS):
    rng = np.random.default_rng(0)
    return curve(SIZES.astype(np.float64)) + rng.multivariate_normal(np.zeros(len(SIZES)), covariance(error), num)


def range_of(values) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


def labels_for(fit: CurveFit, share: float):
    found = fit.possible
    return found.labels_for(CHANCE + share * (found.asymptote - CHANCE))


@pytest.mark.parametrize("family", CURVES)
def test_a_curve_without_noise_is_found(family):
    curve, asymptote, labels = CURVES[family]
    fit = fit_curves(SIZES, curve(SIZES.astype(np.float64)), covariance(1e-4))
    assert fit.family == family
    assert fit.best.asymptote[0] == pytest.approx(asymptote, abs=0.003)
    for share in (0.8, 0.95):
        best = fit.best.labels_for(CHANCE + share * (fit.best.asymptote - CHANCE))
        assert best[0] == pytest.approx(labels(share), rel=0.1)


@pytest.mark.parametrize("error", [0.02, 0.006])
@pytest.mark.parametrize("family", CURVES)
def test_intervals_hold_as_often_as_they_promise(family, error):
    curve, asymptote, labels = CURVES[family]
    held: dict[str, list[bool]] = {}
    for mean in draws(curve, error):
        fit = fit_curves(SIZES, mean, covariance(error))
        truths = {
            "asymptote": (asymptote, range_of(fit.possible.asymptote)),
            "four times the labels": (curve(1200.0), fit.band(1200)),
            "80%": (labels(0.8), range_of(labels_for(fit, 0.8))),
            "95%": (labels(0.95), range_of(labels_for(fit, 0.95))),
        }
        for name, (truth, (low, high)) in truths.items():
            held.setdefault(name, []).append(low <= truth <= high)
    # 50 trials of 90%: more than 2.5 standard errors below it would be 79%.
    assert {name: np.mean(each) for name, each in held.items() if np.mean(each) < 0.79} == {}


@pytest.mark.parametrize("variance", [0.03**2, 0.001**2])
def test_new_measurements_lie_in_their_band_as_often_as_it_promises(variance):
    curve = CURVES[POWER_LAW][0]
    rng = np.random.default_rng(1)
    held: list[bool] = []
    for mean in draws(curve, 0.01):
        low, high = fit_curves(SIZES, mean, covariance(0.01)).band_of_measurement(900, variance)
        held.append(low <= curve(900.0) + rng.normal(0, np.sqrt(variance)) <= high)
    assert np.mean(held) >= 0.79


def test_a_band_of_the_curve_lies_within_that_of_a_measurement():
    curve = CURVES[EXPONENTIAL][0]
    fit = fit_curves(SIZES, curve(SIZES.astype(np.float64)), covariance(0.01))
    for size in (20, 300, 2000):
        (low, high), (new_low, new_high) = fit.band(size), fit.band_of_measurement(size, 0.02**2)
        assert new_low < low < fit.best.at(size)[0] < high < new_high


def test_few_errors_make_narrow_intervals():
    curve = CURVES[EXPONENTIAL][0]
    widths = []
    for error in (0.02, 0.006, 0.001):
        low, high = fit_curves(SIZES, curve(SIZES.astype(np.float64)), covariance(error)).band(600)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.01


def test_a_flat_curve_may_be_flat():
    fit = fit_curves(SIZES, np.full(len(SIZES), 0.62), covariance(0.01))
    assert fit.possible.gap.min() == 0
    assert range_of(fit.possible.asymptote)[0] == pytest.approx(0.62 - 1.645 * 0.01, abs=0.004)


def test_a_falling_curve_is_fitted_by_a_flat_one():
    falling = 0.7 - 0.0004 * SIZES
    fit = fit_curves(SIZES, falling, covariance(0.005))
    assert fit.best.gap[0] == pytest.approx(0, abs=1e-6)
    rise = fit.possible.at(300) - fit.possible.at(20)
    assert rise.min() == 0


def test_the_order_of_magnitude_of_labels_changes_nothing():
    curve = CURVES[POWER_LAW][0]
    mean = curve(SIZES.astype(np.float64))
    fits = [fit_curves(SIZES * scale, mean, covariance(0.01)) for scale in (1, 100)]
    assert fits[0].family == fits[1].family
    assert fits[1].band(60_000) == pytest.approx(fits[0].band(600))


def test_curves_reach_what_they_start_above_at_once_and_their_asymptotes_never():
    curve = CURVES[POWER_LAW][0]
    best = fit_curves(SIZES, curve(SIZES.astype(np.float64)), covariance(1e-4)).best
    assert best.labels_for(best.at(20) - 0.01)[0] == 0
    assert best.labels_for(best.at(200))[0] == pytest.approx(200)
    assert best.labels_for(best.asymptote)[0] > 1e100
