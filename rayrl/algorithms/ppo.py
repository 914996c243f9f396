"""Proximal policy optimisation of whole responses (arXiv 1707.06347), one reward per response, a KL penalty per token.

Rows are responses padded on the right, (batch, seq). A mask is 1 on a response's tokens, a prefix of each row, and 0 on
its padding. The results of `shaped_rewards`, `gae` and `whiten` are 0 on padding, whatever their inputs hold there.
Losses and KL estimates are per token: the training loop masks them and averages them over micro-batches and ranks.
Log-probabilities and KL estimates are in nats, `kl_coef` in reward per nat.
"""

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor
from torch.nn.functional import pad

from rayrl.algorithms.kl import KL_ESTIMATORS

MAX_KL_ERROR = 0.2
"""Bound on the relative error that `adapted_kl_coef` reacts to (arXiv 1909.08593, section 2.2)."""
EQUAL_VARIANCE = 1e-12
"""Values whose variance is at most this share of their mean square are equal but for float32's rounding."""


def kl_penalty(
    logprobs: Float[Tensor, "batch seq"],
    reference_logprobs: Float[Tensor, "batch seq"],
    estimator: str,
) -> Float[Tensor, "batch seq"]:
    """Estimate KL(policy, reference) at each sampled token, from d = log pi - log pi_ref.

    `estimator` is a name in `KL_ESTIMATORS`.
    """
    return KL_ESTIMATORS[estimator](logprobs - reference_logprobs)


def adapted_kl_coef(kl_coef: float, observed_kl: float, *, target_kl: float, num_samples: int, horizon: int) -> float:
    """Next coefficient of a controller that holds the KL at its target (arXiv 1909.08593, section 2.2).

    kl_coef (1 + e num_samples / horizon), e = clip(observed_kl / target_kl - 1, -0.2, 0.2).

    Args:
        kl_coef: The coefficient so far.
        observed_kl: Mean KL of the samples, nats per response.
        target_kl: KL to hold, nats per response.
        num_samples: Responses since the last change of the coefficient.
        horizon: Responses after which a lasting error e has changed the coefficient by the share e.
    """
    relative_error = observed_kl / target_kl - 1
    error = min(max(relative_error, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * (1 + error * num_samples / horizon)


def truncation_penalty(
    scores: Float[Tensor, "batch"], finished: Shaped[Tensor, "batch"], penalty: float
) -> Float[Tensor, "batch"]:
    """Subtract `penalty` from the score of every response that was cut off.

    AlpacaFarm puts a fixed score in place of it instead.
    """
    return torch.where(finished.bool(), scores, scores - penalty)


def shaped_rewards(
    scores: Float[Tensor, "batch"],
    kl: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    kl_coef: float,
) -> Float[Tensor, "batch seq"]:
    """r_t = -kl_coef KL_t at each token, plus the response's score at its last one (arXiv 1909.08593, Eq. 2).

    A response without tokens has no place for its score, and no reward at all.
    """
    mask = mask.bool()
    next_mask = pad(mask[:, 1:], (0, 1))  # the mask one token ahead; False after the last column
    is_last = mask & ~next_mask
    # `where`, not products with the masks: KL estimates on padding may be NaN.
    penalties = torch.where(mask, -kl_coef * kl, 0.0)
    scores_at_end = torch.where(is_last, scores.unsqueeze(1), 0.0)
    return penalties + scores_at_end


def gae(
    rewards: Float[Tensor, "batch seq"],
    values: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Generalised advantage estimation: A_t = sum_l (gamma lambda)^l delta_(t+l), arXiv 1506.02438, Eq. 16.

    delta_t = r_t + gamma V_(t+1) - V_t, where V is 0 after a response's last token: every response is an episode that
    ends there, cut off or not.

    Returns:
        The advantages, and the returns A + V that the value is fitted to. Whiten the advantages afterwards.
    """
    mask = mask.bool()
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    next_values = pad(values[:, 1:], (0, 1))  # V_(t+1)
    deltas = rewards + gamma * next_values - values

    # Eq. 16 as a recursion from the last token to the first: A_t = delta_t + gamma lambda A_(t+1).
    decay = gamma * gae_lambda
    advantages = torch.zeros_like(deltas)
    next_advantages = torch.zeros_like(deltas[:, 0])  # (batch,)
    for t in reversed(range(deltas.shape[1])):
        next_advantages = deltas[:, t] + decay * next_advantages
        advantages[:, t] = next_advantages
    return advantages, advantages + values


def masked_moments(values: Float[Tensor, "batch seq"], mask: Shaped[Tensor, "batch seq"]) -> Float64[Tensor, "3"]:
    """Number, sum and sum of squares of the values under the mask.

    The moments of all ranks' values are the sum of the ranks' moments.
    """
    mask = mask.bool()
    # float64: the variance is a difference of two large sums.
    kept = torch.where(mask, values, 0.0).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    values: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    moments: Float64[Tensor, "3"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Shift and scale values to mean 0 and standard deviation 1 under the mask; equal values all become 0.

    Args:
        values: One per token.
        mask: 1 on the tokens that count.
        moments: `masked_moments` of all values that are whitened alike, where `values` are one rank's share of them.
    """
    mean, std = _mean_and_std(masked_moments(values, mask) if moments is None else moments)
    return torch.where(mask.bool(), (values - mean) / std, 0.0)


def scale_to_unit_std(
    rewards: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    moments: Float64[Tensor, "3"] | None = None,
    *,
    keep_mean: bool = False,
) -> Float[Tensor, "batch seq"]:
    """Divide rewards by their standard deviation under the mask; equal rewards stay as they are.

    Args:
        rewards: One per token.
        mask: 1 on the tokens that count.
        moments: As for `whiten`.
        keep_mean: Add a constant to every token that restores the mean, as AlpacaFarm does (its statistics also count
            padding). Rewards of mean m then gain m (1 - 1 / std) per token, which pays or fines length.
    """
    mean, std = _mean_and_std(masked_moments(rewards, mask) if moments is None else moments)
    shift = mean - mean / std if keep_mean else 0.0
    return torch.where(mask.bool(), rewards / std + shift, 0.0)


def truncated_importance(
    old_logprobs: Float[Tensor, "batch seq"], sampler_logprobs: Float[Tensor, "batch seq"], cap: float
) -> Float[Tensor, "batch seq"]:
    """min(pi_old / pi_sampler, cap) at each token (arXiv 1802.01561, section 4.1), weights for `policy_loss`.

    Corrects for responses sampled by other weights, or by another engine, than those that gave `old_logprobs`.
    """
    ratio = (old_logprobs - sampler_logprobs).exp()
    return ratio.clamp(max=cap)


def policy_loss(
    logprobs: Float[Tensor, "batch seq"],
    old_logprobs: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    *,
    clip_range: float,
    importance: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)), rho = pi / pi_old: Eq. 7 of arXiv 1707.06347, negated.

    `importance` multiplies each token's loss: see `truncated_importance`. It does not move the bounds of the clipping.
    """
    ratio = (logprobs - old_logprobs).exp()  # rho
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return losses if importance is None else losses * importance


def value_loss(
    values: Float[Tensor, "batch seq"],
    old_values: Float[Tensor, "batch seq"],
    returns: Float[Tensor, "batch seq"],
    *,
    clip_range: float,
) -> Float[Tensor, "batch seq"]:
    """max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) / 2: arXiv 2005.12729."""
    clipped_values = values.clamp(old_values - clip_range, old_values + clip_range)
    errors = (values - returns).square()
    clipped_errors = (clipped_values - returns).square()
    return torch.maximum(errors, clipped_errors) / 2


def _mean_and_std(moments: Float64[Tensor, "3"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """Mean and population standard deviation of values with these moments; 1 as the deviation of equal values."""
    num, total, total_squared = moments.unbind()
    mean = total / num
    mean_square = total_squared / num
    variance = mean_square - mean.square()
    # Equal values have no scale to divide by. (NaN, the moments of no values, fails the comparison as well.)
    has_scale = variance > EQUAL_VARIANCE * mean_square
    return mean, torch.where(has_scale, variance, 1.0).sqrt()
