"""Losses on preference pairs, and the log-probabilities they need.

Losses are per pair: averaging over micro-batches and ranks is left to the training loop. Reference log-probabilities
arrive as plain numbers: obtaining them, and keeping them fixed while the policy moves, is left to the caller.
"""

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceLoss(Protocol):
    """A loss of each pair, as a function of D = h_chosen - h_rejected, the difference of its two log-ratios."""

    def __call__(
        self, difference: Float[Tensor, "batch"], *, beta: float, label_smoothing: float
    ) -> Float[Tensor, "batch"]: ...


def sigmoid_loss(difference: Float[Tensor, "batch"], *, beta: float, label_smoothing: float) -> Float[Tensor, "batch"]:
    """-(1 - e) log sigma(beta D) - e log sigma(-beta D): Eq. 7 of arXiv 2305.18290 at e = 0, else conservative DPO.

    The label smoothing e is the assumed probability that the label of a pair is flipped.
    """
    label_kept = logsigmoid(beta * difference)
    label_flipped = logsigmoid(-beta * difference)
    return -(1 - label_smoothing) * label_kept - label_smoothing * label_flipped


def robust_loss(difference: Float[Tensor, "batch"], *, beta: float, label_smoothing: float) -> Float[Tensor, "batch"]:
    """(-(1 - e) log sigma(beta D) + e log sigma(-beta D)) / (1 - 2 e): robust DPO, arXiv 2403.00409, Eq. 12.

    Over labels of which a share e is flipped its mean is the loss of the true labels: conservative DPO's is not.
    """
    label_kept = logsigmoid(beta * difference)
    label_flipped = logsigmoid(-beta * difference)
    return (-(1 - label_smoothing) * label_kept + label_smoothing * label_flipped) / (1 - 2 * label_smoothing)


def ipo_loss(difference: Float[Tensor, "batch"], *, beta: float, label_smoothing: float) -> Float[Tensor, "batch"]:
    """(D - 1 / (2 beta))^2: Eq. 17 of arXiv 2310.12036. It has no smoothed form: the config refuses one."""
    del label_smoothing
    target = 1 / (2 * beta)
    return (difference - target).square()


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid_loss, "robust": robust_loss, "ipo": ipo_loss}
"""Values of `dpo.loss`, which repeats these names: a config must load without torch. A test keeps the two equal."""


def dpo_loss(
    chosen: Float[Tensor, "batch"],
    rejected: Float[Tensor, "batch"],
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    lengths: tuple[Shaped[Tensor, "batch"], Shaped[Tensor, "batch"]] | None = None,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Direct preference optimisation on the summed log-ratios h of whole responses.

    Args:
        chosen: h = log pi(y | x) - log pi_ref(y | x) of the chosen responses, nats; log pi(y | x) alone where there is
            no reference, as in SimPO (arXiv 2405.14734).
        rejected: h of the rejected responses, nats.
        beta: Reward per nat of log-ratio.
        loss: A name in `PREFERENCE_LOSSES`.
        label_smoothing: Probability that a label is flipped, 0 to 0.5; see `sigmoid_loss`.
        margin: Reward by which the chosen response must be ahead: taken from beta D (arXiv 2405.14734, Eq. 6).
        lengths: Tokens of the chosen and of the rejected responses; each h is divided by its length. TRL always does so
            for IPO (its authors' reading of their paper), and calls the sigmoid loss with lengths "sigmoid_norm".

    Returns:
        The loss of each pair, and the detached implicit rewards beta h (Eq. 5 of arXiv 2305.18290, never divided by a
        length) of the chosen and of the rejected responses.
    """
    chosen_rewards = beta * chosen.detach()
    rejected_rewards = beta * rejected.detach()
    if lengths is not None:
        chosen_lengths, rejected_lengths = lengths
        # A response without tokens has h = 0: dividing by 1 keeps it at 0 instead of NaN.
        chosen = chosen / chosen_lengths.clamp(min=1)
        rejected = rejected / rejected_lengths.clamp(min=1)
    difference = chosen - rejected - margin / beta
    losses = PREFERENCE_LOSSES[loss](difference, beta=beta, label_smoothing=label_smoothing)
    return losses, chosen_rewards, rejected_rewards


def desensitised_weights(
    chosen_mask: Shaped[Tensor, "batch seq"], rejected_mask: Shaped[Tensor, "batch seq"], ld_alpha: float
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Weigh the tokens of a pair: 1 up to the length of its shorter response, `ld_alpha` beyond, 0 on padding.

    Sums of log-probabilities under these weights are those of length-desensitised DPO (arXiv 2409.06411, Eq. 10): what
    is longer does not count for more only because it is longer.

    Args:
        chosen_mask: 1 on the tokens of the chosen responses, a prefix of each row.
        rejected_mask: Likewise.
        ld_alpha: 0 to 1; 1 is plain DPO.
    """
    shorter = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)).unsqueeze(1)  # (batch, 1)
    is_shared = torch.arange(chosen_mask.shape[1], device=chosen_mask.device) < shorter  # (batch, seq)
    weights = torch.where(is_shared, 1.0, ld_alpha)
    return weights * chosen_mask.bool(), weights * rejected_mask.bool()


def mean_nll(
    token_logprobs: Float[Tensor, "batch seq"], response_mask: Shaped[Tensor, "batch seq"]
) -> Float[Tensor, "batch"]:
    """-log pi(y | x) / |y| of each response, nats per token: RPO's beside a preference loss (arXiv 2404.19733, Eq. 1).

    It keeps the chosen responses likely, where the difference alone may fall with both of its sides.
    """
    kept = torch.where(response_mask.bool(), token_logprobs, 0.0)
    return -kept.sum(1) / response_mask.sum(1).clamp(min=1)


def on_policy_weights(chosen: Float[Tensor, "batch"], rejected: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Weigh pairs by how likely the policy is to write both responses: WPO with sampled alignment (arXiv 2406.11827).

    w = min(1, exp(m_w + m_l)), where m is the mean over a response's tokens of log pi(y_t) - log sum_v pi(v)^2: a
    token's log-probability beside that of a sample. Responses of the policy itself have weights near 1.

    Args:
        chosen: m of the chosen responses.
        rejected: m of the rejected ones.

    Returns:
        The weight of each pair, without a gradient.
    """
    return (chosen + rejected).detach().exp().clamp(max=1.0)


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, "batch"], rejected_rewards: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """-log sigma(r(x, y_w) - r(x, y_l)) of each pair: Eq. 1 of arXiv 2203.02155."""
    return -logsigmoid(chosen_rewards - rejected_rewards)


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"], token_ids: Int[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Compute log pi(y_t) = z_t[y_t] - logsumexp z_t of each token, nats, in float32.

    `logits[..., t, :]` predicts `token_ids[..., t]`: the caller has shifted them.
    """
    return _TokenLogprobs.apply(logits, token_ids)  # type: ignore[no-any-return]


def log_collisions(logits: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """Compute log sum_v pi(v)^2 = logsumexp 2 z - 2 logsumexp z, nats: how likely two samples are the same token."""
    logits = logits.float()
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` with the gradient (onehot(y_t) - softmax z_t) g_t in one tensor of the logits' size.

    Autograd's own gradient of the same formula takes three of them, and as many passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        normalizers = logits.float().logsumexp(-1)
        ctx.save_for_backward(logits, token_ids, normalizers)
        return logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float() - normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, token_ids, normalizers = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1)
        logits_gradient = (logits.float() - normalizers.unsqueeze(-1)).exp_().mul_(-gradient)
        logits_gradient.scatter_add_(-1, token_ids.unsqueeze(-1), gradient)
        return logits_gradient.to(logits.dtype), None
