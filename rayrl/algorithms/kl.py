"""Estimators of the KL divergence between policy and reference at a sampled token (http://joschu.net/blog/kl-approx.html).

Each takes the log-ratios d = log pi - log pi_ref of tokens that the policy sampled, in nats, and returns an estimate
for each token, in nats. They use methods of the tensor only: configs read the names, and must load without torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # jaxtyping then checks shape and dtype of whatever array it is given


def k1(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """The log-ratio d itself: unbiased and noisy, and negative for many tokens."""
    return log_ratio


def k2(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """d^2 / 2: biased and steadier."""
    return log_ratio.square() / 2


def k3(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """exp(-d) - 1 + d: unbiased and never negative."""
    # expm1 keeps the digits that exp(-d) - 1 loses near d = 0, where most tokens are.
    return (-log_ratio).expm1() + log_ratio


def clamped(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """max(d, 0), AlpacaFarm's: biased upwards.

    It never rewards a token for being less likely than under the reference.
    """
    return log_ratio.clamp(min=0)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "clamped": clamped}
"""Values of `ppo.kl_estimator`."""
