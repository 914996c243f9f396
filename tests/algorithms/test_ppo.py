import math

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype

from rayrl.algorithms import advantages, kl, ppo

checked = jaxtyping.jaxtyped(typechecker=beartype)  # in tests, the shapes in the signatures are enforced
kl_penalty = checked(ppo.kl_penalty)
adapted_kl_coef = checked(ppo.adapted_kl_coef)
truncation_penalty = checked(ppo.truncation_penalty)
centred_and_clipped = checked(ppo.centred_and_clipped)
shaped_rewards = checked(ppo.shaped_rewards)
gae = checked(advantages.gae)
masked_moments = checked(ppo.masked_moments)
whiten = checked(ppo.whiten)
scale_to_unit_std = checked(ppo.scale_to_unit_std)
truncated_importance = checked(ppo.truncated_importance)
policy_loss = checked(ppo.policy_loss)
value_loss = checked(ppo.value_loss)

LENGTHS = (9, 1, 5, 0)
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
KEPT = MASK.numpy()


def noise(seed, shape=(4, 9)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spoiled(values):
    """The same under the mask, and what must not matter on padding."""
    return torch.where(MASK, values, torch.nan)


def wider(values):
    """Three columns of padding more."""
    return torch.nn.functional.pad(values, (0, 3), value=7)


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k3", True), ("k2", False), ("clamped", False)])
def test_kl_estimators_against_the_kl_of_two_categoricals(estimator, unbiased):
    """Weighting every outcome by its probability is the estimator's expectation, exactly."""
    policy, reference = noise(0, (1, 20)).double().log_softmax(-1), noise(1, (1, 20)).double().log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    expected = (policy.exp() * kl_penalty(policy, reference, estimator)).sum().item()
    assert exact > 0.5
    assert (expected == pytest.approx(exact, rel=1e-12)) == unbiased
    assert estimator != "clamped" or expected > exact


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])
    expected = {"k1": [1, -2], "k2": [0.5, 2], "k3": [math.exp(-1), math.exp(2) - 3], "clamped": [1, 0]}
    for estimator, values in expected.items():
        assert kl_penalty(logprobs, reference, estimator)[0].tolist() == pytest.approx(values), estimator


def test_an_added_kl_estimator_is_found_by_its_name(monkeypatch):
    monkeypatch.setitem(kl.KL_ESTIMATORS, "absolute", lambda log_ratio: log_ratio.abs())
    logprobs, reference = noise(0), noise(1)
    assert torch.equal(kl_penalty(logprobs, reference, "absolute"), (logprobs - reference).abs())
    assert torch.equal(kl_penalty(logprobs, reference, "k1"), logprobs - reference)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "clamped"])
def test_kl_estimators_keep_shape_and_dtype(name):
    estimator = checked(kl.KL_ESTIMATORS[name])
    for log_ratios in (noise(0), noise(0, (5,)).double()):
        assert estimator(log_ratios).shape == log_ratios.shape
        assert estimator(log_ratios).dtype == log_ratios.dtype
    with pytest.raises(jaxtyping.TypeCheckError):
        estimator(torch.ones(3, dtype=torch.int64))


def test_k3_is_never_negative():
    log_ratios = torch.cat([10.0 ** torch.arange(-12, 2), -(10.0 ** torch.arange(-12, 2)), torch.zeros(1)])[None]
    assert (kl_penalty(log_ratios, torch.zeros_like(log_ratios), "k3") >= 0).all()


@pytest.mark.parametrize(("observed", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)])
def test_kl_coefficient_follows_the_kl_within_bounds(observed, factor):
    coefficient = adapted_kl_coef(0.5, observed, target_kl=6.0, num_samples=100, horizon=1000)
    assert coefficient == pytest.approx(0.5 * factor)


def test_score_goes_to_the_last_token_of_each_response():
    scores, kl = torch.tensor([1.0, 2.0, 3.0, 4.0]), noise(0)
    expected = np.zeros((4, 9))
    for row, length in enumerate(LENGTHS):
        expected[row, :length] = -0.1 * kl[row, :length].numpy()
        if length:
            expected[row, length - 1] += scores[row].item()
    np.testing.assert_allclose(shaped_rewards(scores, spoiled(kl), MASK, 0.1), expected, rtol=1e-6)


def test_scores_are_centred_before_they_are_clipped():
    scores = torch.tensor([-2.0, 1.0, 4.0, 12.0])
    assert centred_and_clipped(scores).tolist() == scores.tolist()
    assert centred_and_clipped(scores, clip=3.0).tolist() == [-2.0, 1.0, 3.0, 3.0]
    assert centred_and_clipped(scores, mean=3.0, clip=3.0).tolist() == [-3.0, -2.0, 1.0, 3.0]


def test_only_unfinished_responses_are_penalised():
    scores = truncation_penalty(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), 0.5)
    assert scores.tolist() == [1.0, 1.5]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0), (1.0, 0.5)])
def test_gae_is_the_weighted_sum_of_k_step_advantages(gamma, gae_lambda):
    """(1 - lambda) sum_k lambda^(k-1) A^(k): the definition before it telescopes, one token at a time."""
    rewards, values = noise(0), noise(1)
    advantages, returns = gae(spoiled(rewards), spoiled(values), MASK, gamma=gamma, gae_lambda=gae_lambda)
    expected = np.zeros((4, 9))
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row].double().numpy(), np.append(values[row, :length].double().numpy(), 0.0)
        for t in range(length):
            steps = length - t
            k_step = [
                sum(gamma**i * r[t + i] for i in range(k)) + gamma**k * v[t + k] - v[t] for k in range(1, steps + 1)
            ]
            weights = [(1 - gae_lambda) * gae_lambda ** (k - 1) for k in range(1, steps)] + [gae_lambda ** (steps - 1)]
            expected[row, t] = np.dot(weights, k_step)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(KEPT, expected + values.numpy(), 0), atol=1e-5)


def test_gae_of_a_perfect_value_function_is_zero():
    values = noise(0).abs() * MASK
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages, returns = gae(values - 0.9 * following, values, MASK, gamma=0.9, gae_lambda=0.7)
    torch.testing.assert_close(advantages, torch.zeros(4, 9))
    torch.testing.assert_close(returns, values)


def test_whitened_values_have_mean_0_and_deviation_1_under_the_mask():
    whitened = whiten(spoiled(50 + 3 * noise(0)), MASK)
    assert whitened[MASK].mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (whitened[~MASK] == 0).all()


@pytest.mark.parametrize("function", [whiten, scale_to_unit_std])
def test_ranks_that_share_moments_agree_with_one_that_holds_all(function):
    values = 2 + 3 * noise(0)
    moments = masked_moments(values[:1], MASK[:1]) + masked_moments(values[1:], MASK[1:])
    shares = [function(values[rows], MASK[rows], moments) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(shares), function(values, MASK))


def test_scaled_rewards_are_divided_and_can_keep_their_mean():
    rewards = 2 + 3 * noise(0)
    kept = rewards[MASK].double().numpy()
    scaled, unmoved = (scale_to_unit_std(spoiled(rewards), MASK, keep_mean=keep) for keep in (False, True))
    np.testing.assert_allclose(scaled[MASK], kept / kept.std(), rtol=1e-5)
    np.testing.assert_allclose(unmoved[MASK], (kept - kept.mean()) / kept.std() + kept.mean(), rtol=1e-4)
    assert unmoved[MASK].mean().item() == pytest.approx(kept.mean(), rel=1e-5)
    assert (scaled[~MASK] == 0).all() and (unmoved[~MASK] == 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1000.1])
def test_equal_values_have_no_scale(constant):
    values = torch.full((4, 9), constant)
    torch.testing.assert_close(whiten(values, MASK), torch.zeros(4, 9))
    torch.testing.assert_close(scale_to_unit_std(values, MASK), values * MASK)


def test_nothing_under_the_mask_stays_nothing():
    assert (whiten(noise(0), MASK & False) == 0).all()
    assert (scale_to_unit_std(noise(0), MASK & False) == 0).all()


def test_policy_loss_is_the_papers():
    logprobs, old, advantages = noise(0), noise(0) + 0.3 * noise(1), noise(2)
    ratio = np.exp(logprobs.numpy() - old.numpy())
    bounded = np.minimum(np.maximum(ratio, 0.8), 1.2)
    expected = -np.minimum(ratio * advantages.numpy(), bounded * advantages.numpy())
    assert 0.2 < (bounded != ratio).mean() < 0.8
    np.testing.assert_allclose(policy_loss(logprobs, old, advantages, clip_range=0.2), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"),
    [(1, 0.5, False), (1, -0.5, True), (-1, -0.5, False), (-1, 0.5, True), (1, 0.0, True), (-1, 0.1, True)],
)
def test_policy_loss_is_flat_where_clipping_binds(advantage, log_ratio, moves):
    logprobs = torch.tensor([[-2.0]], requires_grad=True)
    policy_loss(logprobs, logprobs.detach() - log_ratio, torch.tensor([[float(advantage)]]), clip_range=0.2).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-advantage * math.exp(log_ratio) if moves else 0)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"),
    [(1, math.log(1.25), True), (1, math.log(1.3), False), (-1, math.log(0.75), False), (-1, math.log(1.3), True)],
)
def test_clip_higher_moves_the_upper_bound_alone(advantage, log_ratio, moves):
    logprobs, advantages = torch.tensor([[-2.0]], requires_grad=True), torch.tensor([[float(advantage)]])
    policy_loss(logprobs, logprobs.detach() - log_ratio, advantages, clip_range=0.2, clip_range_high=0.28).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-advantage * math.exp(log_ratio) if moves else 0)


def test_importance_weights_are_truncated_and_multiply_the_loss():
    old, sampler = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -2.0, -500.0]])
    importance = truncated_importance(old, sampler, 2.0)
    assert importance[0].tolist() == [1.0, 2.0, 2.0]
    logprobs, advantages = noise(0, (1, 3)), noise(1, (1, 3))
    weighted = policy_loss(logprobs, old, advantages, clip_range=0.2, importance=importance)
    torch.testing.assert_close(weighted, importance * policy_loss(logprobs, old, advantages, clip_range=0.2))
    assert truncated_importance(old, old + 0.5, 2.0)[0].tolist() == pytest.approx([math.exp(-0.5)] * 3)


def test_value_loss_is_the_larger_of_clipped_and_unclipped():
    values, old, returns = noise(0), noise(1), noise(2)
    near = np.minimum(np.maximum(values.numpy(), old.numpy() - 0.2), old.numpy() + 0.2)
    expected = 0.5 * np.maximum((values.numpy() - returns.numpy()) ** 2, (near - returns.numpy()) ** 2)
    np.testing.assert_allclose(value_loss(values, old, returns, clip_range=0.2), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "gradient"),
    [(0.1, -0.9), (0.5, 0.0), (-0.5, -1.5)],  # towards the return of 1: within the range, past it, away from it
)
def test_value_loss_is_flat_past_its_range(value, gradient):
    values = torch.tensor([[value]], requires_grad=True)
    value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), clip_range=0.2).backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient)


def test_more_padding_changes_nothing():
    scores, kl, values, wide = noise(0, (4,)), noise(1), noise(2), MASK.new_zeros(4, 12)
    wide[:, :9] = MASK

    def advantages_and_returns(kl, values, mask):
        rewards = scale_to_unit_std(shaped_rewards(scores, kl, mask, 0.1), mask, keep_mean=True)
        advantages, returns = gae(rewards, values, mask, gamma=0.99, gae_lambda=0.95)
        return whiten(advantages, mask), returns

    narrow = advantages_and_returns(kl, values, MASK)
    for ours, theirs in zip(advantages_and_returns(wider(kl), wider(values), wide), narrow, strict=True):
        torch.testing.assert_close(ours[:, :9], theirs)
        assert (ours[~wide] == 0).all()


def test_wrong_shapes_are_refused_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        policy_loss(noise(0), noise(1), noise(2, (4, 8)), clip_range=0.2)
