"""Proximal policy optimisation of whole responses (arXiv 1707.06347), one reward per response, a KL penalty per token.

Rows are responses padded on the right, (batch, seq); a mask is 1 on a response's tokens, a prefix of each row, and 0 on
its padding. What leaves `shaped_rewards`, `gae` and `whiten` is 0 on padding, whatever stood there; losses and KL
estimates are per token, and the training loop masks and averages them over micro-batches and ranks. Log-probabilities
and KL estimates are in nats, `kl_coef` in reward per nat.
"""

from typing import Literal

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor
from torch.nn.functional import pad


def kl_penalty(
    logprobs: Float[Tensor, "batch seq"],
    reference_logprobs: Float[Tensor, "batch seq"],
    estimator: Literal["k1", "k2", "k3", "clamped"],
) -> Float[Tensor, "batch seq"]:
    """KL(policy, reference) at each sampled token, estimated from d = log pi - log pi_ref.

    http://joschu.net/blog/kl-approx.html: k1 = d is unbiased and noisy; k2 = d^2 / 2 is biased and steadier;
    k3 = exp(-d) - 1 + d is unbiased and never negative. "clamped" is max(d, 0), AlpacaFarm's: biased upwards, and it
    never rewards a token for being less likely than under the reference.
    """
    log_ratio = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio
        case "clamped":
            return log_ratio.clamp(min=0)


def adapted_kl_coef(kl_coef: float, observed_kl: float, *, target_kl: float, num_samples: int, horizon: int) -> float:
    """Next coefficient of a controller that holds the KL at its target (arXiv 1909.08593, section 2.2).

    kl_coef (1 + e num_samples / horizon), e = clip(observed_kl / target_kl - 1, -0.2, 0.2). Both KLs are per response,
    in nats; `num_samples` responses were seen since the last change, and `horizon` is in responses too.
    """
    error = min(max(observed_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)


def truncation_penalty(
    scores: Float[Tensor, "batch"], finished: Shaped[Tensor, "batch"], penalty: float
) -> Float[Tensor, "batch"]:
    """Scores, less `penalty` where the response was cut off; AlpacaFarm puts a fixed score in their place instead."""
    return torch.where(finished.bool(), scores, scores - penalty)


def shaped_rewards(
    scores: Float[Tensor, "batch"],
    kl: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    kl_coef: float,
) -> Float[Tensor, "batch seq"]:
    """-kl_coef kl at each token, plus the response's score at its last one (arXiv 1909.08593, Eq. 2).

    An empty response has no token to carry its score, and is rewarded with nothing.
    """
    mask = mask.bool()
    last = mask & ~pad(mask[:, 1:], (0, 1))
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores.unsqueeze(1), 0.0)


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
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    deltas = rewards + gamma * pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages, advantages + values


def masked_moments(values: Float[Tensor, "batch seq"], mask: Shaped[Tensor, "batch seq"]) -> Float64[Tensor, "3"]:
    """Number, sum and sum of squares of the values under the mask: summed over ranks, those of all ranks."""
    kept = torch.where(mask.bool(), values, 0.0).double()
    return torch.stack([mask.bool().sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    values: Float[Tensor, "batch seq"],
    mask: Shaped[Tensor, "batch seq"],
    moments: Float64[Tensor, "3"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Values shifted and scaled to mean 0 and standard deviation 1 under the mask; equal values all become 0.

    Args:
        values: One per token.
        mask: 1 on the tokens that count.
        moments: `masked_moments` of all values to be whitened alike, where those here are one rank's share.
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
    """Rewards divided by their standard deviation under the mask; equal rewards stay as they are.

    `keep_mean` adds what restores their mean to every token, as AlpacaFarm does (its statistics also count padding):
    rewards of mean m then gain m (1 - 1 / std) per token, which pays or fines length. `moments` as for `whiten`.
    """
    mean, std = _mean_and_std(masked_moments(rewards, mask) if moments is None else moments)
    shift = mean - mean / std if keep_mean else 0.0
    return torch.where(mask.bool(), rewards / std + shift, 0.0)


def truncated_importance(
    old_logprobs: Float[Tensor, "batch seq"], sampler_logprobs: Float[Tensor, "batch seq"], cap: float
) -> Float[Tensor, "batch seq"]:
    """min(pi_old / pi_sampler, cap) at each token (arXiv 1802.01561, section 4.1), weights for `policy_loss`.

    Corrects for responses written by weights, or by an engine, other than those that gave `old_logprobs`.
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap)


def policy_loss(
    logprobs: Float[Tensor, "batch seq"],
    old_logprobs: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    *,
    clip_range: float,
    importance: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)), rho = pi / pi_old: Eq. 7 of arXiv 1707.06347, negated.

    `importance` multiplies each token's loss: see `truncated_importance`. It leaves the clipping where it is.
    """
    ratio = (logprobs - old_logprobs).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return losses if importance is None else losses * importance


def value_loss(
    values: Float[Tensor, "batch seq"],
    old_values: Float[Tensor, "batch seq"],
    returns: Float[Tensor, "batch seq"],
    *,
    clip_range: float,
) -> Float[Tensor, "batch seq"]:
    """max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) / 2: arXiv 2005.12729."""
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def _mean_and_std(moments: Float64[Tensor, "3"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """Mean and (population) standard deviation; 1 for values equal up to float32's rounding, which have no scale."""
    mean, mean_square = moments[1] / moments[0], moments[2] / moments[0]
    variance = mean_square - mean.square()
    return mean, torch.where(variance > 1e-12 * mean_square, variance, 1.0).sqrt()
