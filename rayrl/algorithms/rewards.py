"""Rewards that hold up better while the policy moves: ensembles of reward models, and pairs reweighted towards it.

Neither needs a new label. What the members are, and how a weight enters a loss, is decided elsewhere.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def ensemble_reward(
    rewards: Float[Tensor, "members batch"],
    objective: Literal["mean", "worst_case", "uncertainty_weighted"],
    *,
    variance_coef: float = 0.0,
) -> Float[Tensor, "batch"]:
    """One reward from several reward models' (arXiv 2310.02743).

    "mean" over the members; "worst_case", the least of them; "uncertainty_weighted", mean - variance_coef variance,
    with the members' population variance, so that a single member has none. Only differences within one reward model
    mean anything: standardise each member first.
    """
    match objective:
        case "mean":
            return rewards.mean(0)
        case "worst_case":
            return rewards.amin(0)
        case "uncertainty_weighted":
            return rewards.mean(0) - variance_coef * rewards.var(0, correction=0)


def log_relative_ratio(log_ratio: Float[Tensor, "batch"], alpha: float) -> Float[Tensor, "batch"]:
    """Log of p / (alpha p + (1 - alpha) q) from log p/q: the density ratio, held below 1 / alpha (arXiv 1106.4729).

    `alpha` is between 0, the plain ratio, and 1, no ratio at all.
    """
    log_alpha, log_rest = log_ratio.new_tensor([alpha, 1 - alpha]).log()
    return -torch.logaddexp(log_alpha, log_rest - log_ratio)


def ocrm_weights(
    chosen: Float[Tensor, "batch"], rejected: Float[Tensor, "batch"], *, alpha: float, multiplier: float
) -> Float[Tensor, "batch"]:
    """Importance weights of preference pairs towards the current policy: off-policy corrected RM, arXiv 2507.15507.

    (r_alpha(y_w) r_alpha(y_l))^multiplier, where r_alpha = p / (alpha p + (1 - alpha) q) is a response's relative
    density ratio under the current policy p and the policy q that wrote the pair. The multiplier, tiny (0.001 in the
    authors' scripts, with alpha 0.1), tames ratios of whole sequences. No weight exceeds alpha^(-2 multiplier); they
    are not normalised.

    The ratios are formed from log-ratios, and neither over- nor underflow. The authors' code forms them from
    probabilities with a floor of 1e-36, below which (log-probabilities under -83 nats) the reference drops out.

    Args:
        chosen: log p - log q of the chosen responses, summed over their tokens, nats.
        rejected: The same of the rejected responses.
        alpha: Between 0 and 1, see `log_relative_ratio`.
        multiplier: 0 weighs all pairs alike.
    """
    return torch.exp(multiplier * (log_relative_ratio(chosen, alpha) + log_relative_ratio(rejected, alpha)))
