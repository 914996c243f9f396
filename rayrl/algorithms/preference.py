"""Losses on preference pairs, and the log-probabilities they need.

Per-pair values everywhere; averaging over micro-batches and ranks is the training loop's business. The reference
log-probabilities are plain numbers here: where they come from, and that they never follow the moving policy, is too.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen: Float[Tensor, "batch"],
    rejected: Float[Tensor, "batch"],
    *,
    beta: float,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: tuple[Shaped[Tensor, "batch"], Shaped[Tensor, "batch"]] | None = None,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Direct preference optimisation on the summed log-ratios h of whole responses.

    With h = log pi(y | x) - log pi_ref(y | x) and D = h_chosen - h_rejected:
    "sigmoid" is -log sigma(beta D), Eq. 7 of arXiv 2305.18290; label smoothing e makes it
    -(1 - e) log sigma(beta D) - e log sigma(-beta D), conservative DPO.
    "ipo" is (D - 1 / (2 beta))^2, Eq. 17 of arXiv 2310.12036; smoothing does not apply to it.
    Lengths (chosen, rejected), in tokens, divide each h first. TRL always does so for IPO (its authors' reading of
    their paper), and calls the sigmoid loss with lengths "sigmoid_norm".

    Returns:
        The loss of each pair, and the detached implicit rewards beta h (Eq. 5, never length-normalised) of the chosen
        and of the rejected responses.
    """
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if lengths is not None:
        chosen, rejected = chosen / lengths[0].clamp(min=1), rejected / lengths[1].clamp(min=1)
    margin = chosen - rejected
    if loss == "ipo":
        return (margin - 1 / (2 * beta)).square(), *rewards
    kept, flipped = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped, *rewards


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, "batch"], rejected_rewards: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """-log sigma(r(x, y_w) - r(x, y_l)) of each pair: Eq. 1 of arXiv 2203.02155."""
    return -logsigmoid(chosen_rewards - rejected_rewards)


def token_logprobs(
    logits: Float[Tensor, "batch seq vocab"], token_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Log-probability of each token, nats, in float32.

    `logits[:, t]` predicts `token_ids[:, t]`: the caller has shifted them. The chosen logit minus logsumexp keeps
    nothing of the logits' size for the backward pass, where log_softmax keeps a second copy of them; half-precision
    logits are widened, which costs one.
    """
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float()
    return chosen - logits.float().logsumexp(-1)


def sequence_logprobs(
    logits: Float[Tensor, "batch seq vocab"],
    token_ids: Int[Tensor, "batch seq"],
    response_mask: Shaped[Tensor, "batch seq"],
) -> Float[Tensor, "batch"]:
    """Summed log-probability of the tokens under the mask; see `token_logprobs`."""
    return torch.where(response_mask.bool(), token_logprobs(logits, token_ids), 0.0).sum(-1)
