import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype

from rayrl.algorithms import rewards

checked = jaxtyping.jaxtyped(typechecker=beartype)  # in tests, the shapes in the signatures are enforced
ensemble_reward = checked(rewards.ensemble_reward)
log_relative_ratio = checked(rewards.log_relative_ratio)
ocrm_weights = checked(rewards.ocrm_weights)


def test_ensembles_by_hand():
    members = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    assert ensemble_reward(members, "mean").tolist() == [4, 5]
    assert ensemble_reward(members, "worst_case").tolist() == [1, 5]
    variance = (9 + 1 + 16) / 3
    weighted = ensemble_reward(members, "uncertainty_weighted", variance_coef=0.5)
    assert weighted.tolist() == pytest.approx([4 - 0.5 * variance, 5])


def test_an_added_objective_is_found_by_its_name(monkeypatch):
    members = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    before = ensemble_reward(members, "mean")
    monkeypatch.setitem(rewards.ENSEMBLE_OBJECTIVES, "median", lambda rewards, variance_coef: rewards.median(0).values)
    assert ensemble_reward(members, "median").tolist() == [3, 5]
    assert torch.equal(ensemble_reward(members, "mean"), before)


@pytest.mark.parametrize("objective", ["mean", "worst_case", "uncertainty_weighted"])
def test_an_ensemble_of_one_is_its_member(objective):
    member = torch.linspace(-3, 3, 5)
    assert torch.equal(ensemble_reward(member[None], objective, variance_coef=0.5), member)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("multiplier", [0.001, 0.5, 1.0])
def test_ocrm_weights_are_those_of_probability_space_where_it_is_safe(alpha, multiplier):
    logprobs = -30 * np.random.default_rng(0).random((4, 50))
    chosen, rejected, reference_chosen, reference_rejected = np.exp(logprobs)
    ratios = [
        p / (alpha * p + (1 - alpha) * q) for p, q in [(chosen, reference_chosen), (rejected, reference_rejected)]
    ]
    expected = (ratios[0] * ratios[1]) ** multiplier
    tensors = torch.from_numpy(logprobs)
    weights = ocrm_weights(tensors[0] - tensors[2], tensors[1] - tensors[3], alpha=alpha, multiplier=multiplier)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    narrow = tensors.float()
    weights = ocrm_weights(narrow[0] - narrow[2], narrow[1] - narrow[3], alpha=alpha, multiplier=multiplier)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_ocrm_weights_see_the_reference_at_any_length():
    """Long responses have log-probabilities whose exponentials are 0 in any float; their ratios are ordinary."""
    policy, reference = torch.tensor([-2000.0, -2000.0, -2000.0]), torch.tensor([-2002.0, -2000.0, -1998.0])
    log_ratios = policy - reference
    ratios = log_ratios.double().exp()
    expected = (ratios / (0.1 * ratios + 0.9)).square()
    weights = ocrm_weights(log_ratios, log_ratios, alpha=0.1, multiplier=1.0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


def test_ocrm_weights_are_bounded_at_extreme_ratios():
    log_ratios = torch.tensor([-2000.0, 0.0, 2000.0])
    weights = ocrm_weights(log_ratios, log_ratios, alpha=0.1, multiplier=0.001)
    assert weights.tolist() == pytest.approx([np.exp(-4) * 0.9**-0.002, 1, 0.1**-0.002])
    assert log_relative_ratio(log_ratios, 0.0).tolist() == log_ratios.tolist()
    assert log_relative_ratio(log_ratios, 1.0).tolist() == [0, 0, 0]


def test_ocrm_weights_favour_pairs_the_policy_would_write():
    log_ratios, level = torch.tensor([-20.0, -1.0, 0.0, 1.0, 20.0]), torch.zeros(5)
    for pair in [(log_ratios, level), (level, log_ratios)]:
        weights = ocrm_weights(*pair, alpha=0.1, multiplier=0.5)
        assert (weights.diff() > 0).all()
    assert torch.equal(ocrm_weights(log_ratios, level, alpha=0.1, multiplier=0.0), torch.ones(5))
