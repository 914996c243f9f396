import numpy as np
import pytest

from rayrl.algorithms.scoring import expected_score, mean_of_samples

SCORES = np.arange(6)


def test_expected_score_is_renormalised_over_the_allowed_scores():
    logprobs = np.log([0.1, 0.0 + 1e-12, 0.2, 1e-12, 1e-12, 0.1])
    assert expected_score(logprobs, SCORES, min_mass=0.3) == pytest.approx((0.2 * 2 + 0.1 * 5) / 0.4)


def test_too_little_mass_abstains():
    logprobs = np.log(np.full(6, 0.01))
    assert expected_score(logprobs, SCORES, min_mass=0.05) == pytest.approx(2.5)
    assert expected_score(logprobs, SCORES, min_mass=0.07) is None


def test_extreme_log_probabilities():
    far = np.full(6, -2000.0)
    assert expected_score(far, SCORES, min_mass=0.1) is None
    assert expected_score(np.full(6, -np.inf), SCORES, min_mass=0.0) is None
    certain = np.array([-np.inf, -np.inf, -np.inf, -np.inf, 0.0, -np.inf])
    assert expected_score(certain, SCORES, min_mass=0.5) == 4.0


def test_mean_of_samples_leaves_abstentions_out():
    assert mean_of_samples([1.0, None, 4.0]) == 2.5
    assert mean_of_samples([None, None]) is None
    assert mean_of_samples([]) is None
