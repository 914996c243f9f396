"""Advantages of whole responses: by hand, and the identities between the estimators. GAE is in test_ppo.py."""

import math

import jaxtyping
import pytest
import torch
from beartype import beartype

from rayrl.algorithms.advantages import ADVANTAGES, gae, group_mean, group_normalised, rloo

RETURNS = torch.tensor([1.0, 5.0, 2.0, 3.0, 0.0, 6.0])
GROUPS = torch.tensor([0, 1, 0, 1, 0, 2])
"""Two prompts with 3 and 2 responses, interleaved, and one with a single response."""
COMPARING = ["rloo", "group_mean", "group_normalised"]


def checked(function):
    return jaxtyping.jaxtyped(function, typechecker=beartype)


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rloo_by_hand():
    # 1 - (2 + 0) / 2, 2 - (1 + 0) / 2, 0 - (1 + 2) / 2; 5 - 3, 3 - 5; nothing to compare with
    assert checked(rloo)(RETURNS, GROUPS).tolist() == [0.0, 2.0, 1.5, -2.0, -1.5, 0.0]


def test_group_mean_by_hand():
    assert checked(group_mean)(RETURNS, GROUPS).tolist() == [0.0, 1.0, 1.0, -1.0, -1.0, 0.0]


def test_group_normalised_by_hand():
    deviation = math.sqrt(2 / 3)  # of 1, 2 and 0 around their mean
    expected = [0.0, 1.0, 1 / deviation, -1.0, -1 / deviation, 0.0]
    assert checked(group_normalised)(RETURNS, GROUPS).tolist() == pytest.approx(expected)


def test_leaving_one_out_is_the_group_mean_times_k_over_k_minus_1():
    returns, groups = noise(32), torch.arange(32) // 4
    torch.testing.assert_close(rloo(returns, groups), 4 / 3 * group_mean(returns, groups))


@pytest.mark.parametrize("name", COMPARING)
def test_advantages_add_up_to_0_in_a_group_and_do_not_depend_on_the_order(name):
    estimate = ADVANTAGES[name].estimate
    returns, groups = noise(24), torch.arange(24) // 3
    advantages = estimate(returns, groups)
    torch.testing.assert_close(advantages.view(8, 3).sum(1), torch.zeros(8), atol=1e-5, rtol=0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(estimate(returns[order], groups[order]), advantages[order])


@pytest.mark.parametrize("name", COMPARING)
def test_a_constant_changes_nothing_and_equal_returns_teach_nothing(name):
    estimate = ADVANTAGES[name].estimate
    returns, groups = noise(12), torch.arange(12) // 4
    torch.testing.assert_close(estimate(returns + 3.0, groups), estimate(returns, groups), atol=1e-5, rtol=1e-4)
    for constant in (0.0, 0.1, -1000.1):
        equal = estimate(torch.full((12,), constant), groups)
        torch.testing.assert_close(equal, torch.zeros(12), atol=1e-3 if abs(constant) > 1 else 1e-6, rtol=0)
    assert (group_normalised(torch.full((12,), -1000.1), groups) == 0).all()


@pytest.mark.parametrize("name", COMPARING)
def test_no_response_has_no_advantage(name):
    assert ADVANTAGES[name].estimate(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_leaving_one_out_is_unbiased_where_the_mean_of_all_shrinks_the_gradient():
    """Over all pairs of two actions, of a policy with one logit: the expected estimate against the exact gradient."""
    probability, rewards = 0.3, (0.0, 1.0)
    score = (-probability, 1 - probability)  # d log pi / d logit of each action
    exact = probability * (1 - probability) * (rewards[1] - rewards[0])
    found = dict.fromkeys(COMPARING[:2], 0.0)
    for first in (0, 1):
        for second in (0, 1):
            weight = math.prod(probability if action else 1 - probability for action in (first, second))
            returns = torch.tensor([rewards[first], rewards[second]])
            for name in found:
                advantages = ADVANTAGES[name].estimate(returns, torch.zeros(2, dtype=torch.int64)).tolist()
                found[name] += weight * (score[first] * advantages[0] + score[second] * advantages[1]) / 2
    assert found == pytest.approx({"rloo": exact, "group_mean": exact / 2})


def test_only_gae_reads_values():
    assert [name for name, estimator in ADVANTAGES.items() if estimator.reads_values] == ["gae"]
    assert ADVANTAGES["gae"].estimate is gae
