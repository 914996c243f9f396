"""Proximal policy optimisation of whole responses (arXiv 1707.06347), one reward per response, a KL penalty per token.

Rows are responses padded on the right, (batch, seq). A mask is 1 on a response's tokens, a prefix of each row, and 0 on
its padding. The results of `shaped_rewards` and `whiten` are 0 on padding, whatever their inputs hold there. Losses and
KL estimates are per token: the training loop masks them and averages them over micro-batches and ranks. Advantages are
in `rayrl.algorithms.advantages`.
Log-probabilities and KL estimates are in nats, `kl_coef` in reward per nat.
"""

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor
from torch.nn.functional import pad

from rayrl.algorithms.advantages import EQUAL_VARIANCE
from rayrl.algorithms.kl import KL_ESTIMATORS

MAX_KL_ERROR = 0.2
"""Bound on the relative error that `adapted_kl_coef` reacts to (arXiv 1909.08593, section 2.2)."""


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


def centred_and_clipped(
    scores: Float[Tensor, "batch"], *, mean: float = 0.0, clip: float | None = None
) -> Float[Tensor, "batch"]:
    """clip(s - mean, -clip, clip): scores around their mean, and none of them further from it than `clip`.

    A reward model's scores have no origin of their own, since only their differences are trained.
    """
    centred = scores - mean
    return centred if clip is None else centred.clamp(-clip, clip)


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
    clip_range_high: float | None = None,
    importance: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)), rho = pi / pi_old: Eq. 7 of arXiv 1707.06347, negated.

    `clip_range_high` takes the place of the second range ("clip-higher", arXiv 2503.14476, section 3.1): above
    `clip_range` it leaves unlikely tokens more room to become likely. `importance` multiplies each token's loss: see
    `truncated_importance`. It does not move the bounds of the clipping.
    """
    ratio = (logprobs - old_logprobs).exp()  # rho
    clipped_ratio = ratio.clamp(*ratio_bounds(clip_range, clip_range_high))
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return losses if importance is None else losses * importance


def ratio_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Return the probability ratios between which the policy loss is not clipped."""
    return 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)


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
