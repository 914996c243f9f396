"""Advantages of PPO: how much better a response, or each of its tokens, was than expected.

`gae` expects what a value function says, token by token. The others need no value function: they compare the responses
to one prompt with each other, as whole responses, and every token of a response gets the response's advantage. What
they compare is the response's return R, the sum of its tokens' shaped rewards: its score, and the KL penalties of all
its tokens. With the estimator "k1" of the KL that is score - kl_coef (log pi - log pi_ref), as RLOO has it.

Rows are padded as in `rayrl.algorithms.ppo`. Functions use methods of the tensors only: configs read the names, and
must load without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int64, Shaped

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # jaxtyping then checks shape and dtype of whatever array it is given

EQUAL_VARIANCE = 1e-12
"""Values whose variance is at most this share of their mean square are equal but for float32's rounding."""


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
    is_padding = ~mask.bool()
    rewards = rewards.masked_fill(is_padding, 0.0)
    values = values.masked_fill(is_padding, 0.0)

    # Eq. 16 as a recursion from the last token to the first: A_t = delta_t + gamma lambda A_(t+1).
    decay = gamma * gae_lambda
    advantages = rewards.new_zeros(rewards.shape)
    next_values = next_advantages = rewards.new_zeros(rewards.shape[0])  # (batch,)
    for t in reversed(range(rewards.shape[1])):
        deltas = rewards[:, t] + gamma * next_values - values[:, t]
        next_advantages = deltas + decay * next_advantages
        next_values = values[:, t]
        advantages[:, t] = next_advantages
    return advantages, advantages + values


def rloo(returns: Float[Tensor, "batch"], groups: Int64[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """A_i = R_i - 1 / (k - 1) sum_(j != i) R_j: REINFORCE, leaving one out (arXiv 2402.14740).

    The mean of the other responses does not depend on the response itself, so that the gradient is unbiased.

    Args:
        returns: R of each response.
        groups: Number of each response's prompt, from 0 and below the batch's size. A group of one has no others to be
            compared with: its advantage is 0.
    """
    num = _group_sums(returns.new_ones(returns.shape), groups)
    others = _group_sums(returns, groups) - returns
    is_alone = num < 2
    return (returns - others / (num - 1).clamp(min=1)).masked_fill(is_alone, 0.0)


def group_mean(returns: Float[Tensor, "batch"], groups: Int64[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """A_i = R_i - mean_j R_j (Dr. GRPO, arXiv 2503.20783, section 3.2): RLOO's, times (k - 1) / k.

    Arguments are those of `rloo`.
    """
    num = _group_sums(returns.new_ones(returns.shape), groups)
    return returns - _group_sums(returns, groups) / num


def group_normalised(returns: Float[Tensor, "batch"], groups: Int64[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """A_i = (R_i - mean_j R_j) / std_j R_j (GRPO, arXiv 2402.03300, section 4.1.2); 0 in a group of equal returns.

    The standard deviation is the population's. Prompts whose responses hardly differ weigh as much as those whose
    responses do. Arguments are those of `rloo`.
    """
    num = _group_sums(returns.new_ones(returns.shape), groups)
    centred = group_mean(returns, groups)
    variance = _group_sums(centred.square(), groups) / num
    mean_square = _group_sums(returns.square(), groups) / num
    is_equal = variance <= EQUAL_VARIANCE * mean_square
    return (centred / variance.masked_fill(is_equal, 1.0).sqrt()).masked_fill(is_equal, 0.0)


def _group_sums(values: Float[Tensor, "batch"], groups: Int64[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Sum the values of each row's group."""
    return values.new_zeros(values.shape).index_add(0, groups, values)[groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageEstimator:
    """A way to estimate advantages, and the input that it reads."""

    estimate: Callable[..., Any]
    """With a value function called as `gae`, per token; without one as `rloo`, per response."""
    reads_values: bool
    """Whether a value function is trained beside the policy. Otherwise responses to one prompt are compared."""


ADVANTAGES: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(estimate=gae, reads_values=True),
    "rloo": AdvantageEstimator(estimate=rloo, reads_values=False),
    "group_mean": AdvantageEstimator(estimate=group_mean, reads_values=False),
    "group_normalised": AdvantageEstimator(estimate=group_normalised, reads_values=False),
}
"""Values of `ppo.advantages`. Config, training and report learn of an estimator from its entry."""
