import numpy as np
import pytest

from rayrl.algorithms.scoring import expected_score, mean_of_samples, predictive_entropy

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


def test_predictive_entropy_by_hand():
    """Of one judgement its own distribution's; of several their mean's, each renormalised before."""
    one, other = np.log([0.4, 0.4, 1e-300]), np.log([1e-300, 0.2, 0.2])
    assert predictive_entropy([one], min_mass=0.3) == pytest.approx(np.log(2))
    # (1/2, 1/2, 0) and (0, 1/2, 1/2): their mean is (1/4, 1/2, 1/4).
    assert predictive_entropy([one, other], min_mass=0.3) == pytest.approx(1.5 * np.log(2))
    assert predictive_entropy([np.log(np.full(5, 0.03))], min_mass=0.1) == pytest.approx(np.log(5))
    assert predictive_entropy([np.array([-np.inf, 0.0, -np.inf])], min_mass=0.1) == 0.0


def test_judgements_that_abstain_have_no_part_in_the_entropy():
    sure, unclear = np.log([0.9, 1e-300]), np.log([0.02, 0.02])
    assert predictive_entropy([sure, unclear], min_mass=0.1) == pytest.approx(0.0)
    assert predictive_entropy([unclear], min_mass=0.1) is None
    assert predictive_entropy([], min_mass=0.1) is None
