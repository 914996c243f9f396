"""Rewards that hold up better while the policy moves: ensembles of reward models, and importance weights of pairs.

Neither needs a new label. Training the members, and applying a weight to a loss, is left to the caller.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def mean_reward(rewards: Float[Tensor, "members batch"], variance_coef: float) -> Float[Tensor, "batch"]:
    """mean_i r_i."""
    del variance_coef
    return rewards.mean(0)


def worst_case_reward(rewards: Float[Tensor, "members batch"], variance_coef: float) -> Float[Tensor, "batch"]:
    """min_i r_i: a response is worth no more than its harshest member gives."""
    del variance_coef
    return rewards.amin(0)


def uncertainty_weighted_reward(
    rewards: Float[Tensor, "members batch"], variance_coef: float
) -> Float[Tensor, "batch"]:
    """mean_i r_i - c var_i r_i, with the population variance: a single member has none."""
    variances = rewards.var(0, correction=0)
    return rewards.mean(0) - variance_coef * variances


ENSEMBLE_OBJECTIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": mean_reward,
    "worst_case": worst_case_reward,
    "uncertainty_weighted": uncertainty_weighted_reward,
}
"""Values of `reward_model.objective`, which repeats these names: a config must load without torch. A test keeps the two
equal."""


def ensemble_reward(
    rewards: Float[Tensor, "members batch"], objective: str, *, variance_coef: float = 0.0
) -> Float[Tensor, "batch"]:
    """Combine the rewards of several reward models into one (arXiv 2310.02743).

    Args:
        rewards: Of each member. Only differences within one reward model mean anything: standardise each member first.
        objective: A name in `ENSEMBLE_OBJECTIVES`.
        variance_coef: c, reward per unit of variance.
    """
    return ENSEMBLE_OBJECTIVES[objective](rewards, variance_coef)


def log_relative_ratio(log_ratio: Float[Tensor, "batch"], alpha: float) -> Float[Tensor, "batch"]:
    """Log of p / (alpha p + (1 - alpha) q) from log p/q: the density ratio, held below 1 / alpha (arXiv 1106.4729).

    `alpha` is between 0, the plain ratio, and 1, no ratio at all.
    """
    # Divided by p, the denominator is alpha + (1 - alpha) q/p, and its log is a logaddexp: no ratio is ever formed, so
    # none over- or underflows. log 0 = -inf is right at either end of alpha.
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
        rejected: log p - log q of the rejected responses.
        alpha: Between 0 and 1, see `log_relative_ratio`.
        multiplier: 0 weighs all pairs alike.
    """
    log_chosen_ratio = log_relative_ratio(chosen, alpha)
    log_rejected_ratio = log_relative_ratio(rejected, alpha)
    return torch.exp(multiplier * (log_chosen_ratio + log_rejected_ratio))
