"""Auxiliary losses on two views of one prompt: RLP's unsupervised multi-view learning and its ablations.

A view is the reward model's last hidden state of one response to the prompt; a code is the Gaussian an encoder makes of
it (both modules are in `rayrl.models.view_networks`). RLP (arXiv 2403.19279, Sec. 4.2) adds lambda = 0.5 times
`uml_loss` to the preference loss, with I(z1; z2) estimated as in Deep InfoMax and the loss as in the multi-view
information bottleneck (arXiv 2002.07017).

Row i of every batch belongs to prompt i. Negative pairs join neighbouring rows, so the rows must be of different
prompts, and a batch has at least two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

Objective = Literal["uml", "mvi", "infomax", "contrastive"]
Score = Callable[[Tensor, Tensor], Tensor]
"""A critic T(a, b): one score per row of two batches."""


class Gaussian(NamedTuple):
    """One diagonal Gaussian per row."""

    mu: Float[Tensor, "batch z"]
    sigma: Float[Tensor, "batch z"]
    """Standard deviations, positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiViewLoss:
    """What to minimise, and two detached numbers to watch."""

    loss: Float[Tensor, ""]
    mi: Float[Tensor, ""]
    """The batch's estimate of the maximised mutual information, nats: `mi_nats`, or log(batch) - InfoNCE."""
    skl: Float[Tensor, ""]
    """Mean symmetrised divergence of the two codes, nats, whether or not the loss contains it."""


def jensen_shannon_mi(joint_scores: Float[Tensor, "n"], product_scores: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """E_joint[-softplus(-T)] - E_product[softplus(T)], to be maximised: Eq. 4 of arXiv 1808.06670.

    An objective, not mutual information in nats: for any critic it is at most 2 JSD(joint, product) - 2 log 2, which
    is between -2 log 2 (independent) and 0 and grows with the dependence. The bound is met by T* = log joint / product;
    `mi_nats` reads nats off such a critic.
    """
    return -softplus(-joint_scores).mean() - softplus(product_scores).mean()


def mi_nats(joint_scores: Float[Tensor, "n"], product_scores: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """E_joint[T] - E_product[exp T] + 1: a lower bound on mutual information, nats, exact at T* = log joint / product.

    This is the bound of Nguyen, Wainwright and Jordan read with the critic that `jensen_shannon_mi` trains (arXiv
    1905.06922, Sec. 2), and what the release of arXiv 2002.07017 logs. One batch's value may exceed the true
    information, and exp T makes it noisy beyond a few nats: log it, do not train on it.
    """
    return joint_scores.mean() - product_scores.exp().mean() + 1


def rolled(rows: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    """The batch moved down by one row: beside another batch, samples from the product of the marginals.

    Raises:
        ValueError: the batch has fewer than two rows, so that a row would meet itself.
    """
    if len(rows) < 2:
        raise ValueError(f"negative pairs need a batch of at least 2 prompts, got {len(rows)}")
    return rows.roll(1, 0)


def score_pairs(
    score: Score, a: Float[Tensor, "batch d"], b: Float[Tensor, "batch e"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """T on the joint pairs (a_i, b_i), and on the product pairs (a_{i-1}, b_i)."""
    return score(a, b), score(rolled(a), b)


def symmetric_kl(
    mu1: Float[Tensor, "batch z"],
    sigma1: Float[Tensor, "batch z"],
    mu2: Float[Tensor, "batch z"],
    sigma2: Float[Tensor, "batch z"],
) -> Float[Tensor, "batch"]:
    """(KL(1 || 2) + KL(2 || 1)) / 2 of diagonal Gaussians with standard deviations sigma, nats per row.

    1/4 sum_d [(s1^2 + D^2) / s2^2 + (s2^2 + D^2) / s1^2 - 2] with D = mu1 - mu2, written as a sum of squares: nothing
    cancels, and it is never negative. The release of arXiv 2002.07017 estimates it from one sample of each code.
    """
    spread = (sigma1 / sigma2 - sigma2 / sigma1).square()
    shift = (mu1 - mu2).square() * (sigma1**-2 + sigma2**-2)
    return (spread + shift).sum(-1) / 4


def gaussian_sample(
    mu: Float[Tensor, "batch z"], sigma: Float[Tensor, "batch z"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch z"]:
    """One sample mu + sigma eps, eps ~ N(0, 1), per row, differentiable in mu and sigma (arXiv 1312.6114).

    The generator, torch's own when None, must live on the device of `mu`.
    """
    return mu + sigma * torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)


def info_nce(z1: Float[Tensor, "batch z"], z2: Float[Tensor, "batch z"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Cross-entropy of finding row i of one batch among all rows of the other, averaged over both directions.

    Eq. 4 of arXiv 1807.03748 with cosine similarity / temperature as the score. log(batch) minus it is a lower bound
    on I(z1; z2) in nats (Eq. 5), which therefore never shows more than log(batch).

    Raises:
        ValueError: the batch has fewer than two rows.
    """
    if len(z1) < 2:
        raise ValueError(f"negative pairs need a batch of at least 2 prompts, got {len(z1)}")
    logits = normalize(z1, dim=-1) @ normalize(z2, dim=-1).T / temperature
    rows = torch.arange(len(z1), device=z1.device)
    return (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2


def uml_loss(
    views: tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]],
    codes: tuple[Gaussian, Gaussian],
    score: Score,
    *,
    objective: Objective = "uml",
    skl_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> MultiViewLoss:
    """RLP's L_M (arXiv 2403.19279, Sec. 4.2), or one of the losses its Table 4 puts in its place.

    With one sample z_i of each code:
    "uml" is -I(z1; z2) + skl_weight SKL(p(z | v1), p(z | v2)).
    "mvi" is -I(z1; z2).
    "infomax" is -I(v; z), averaged over both views: nothing ties the views together.
    "contrastive" is `info_nce` of z1 and z2. The paper writes "a contrastive learning loss" and cites SwAV (arXiv
    2006.09882), whose loss has prototypes and no explicit negatives; the positive pairs are the paper's, the loss the
    common one.

    Args:
        views: What the codes were made of; only "infomax" reads them. Detach them to keep the critic from reaching
            the reward model past the encoder.
        codes: The encoder's answers to the two views.
        score: The critic: T(z1, z2), for "infomax" T(v, z); "contrastive" never calls it.
        objective: Which loss.
        skl_weight: Weight of the divergence in "uml". 1 in RLP; the release of arXiv 2002.07017 raises it from 1e-3
            to 1, exponentially, while it trains.
        generator: Draws the samples.

    Raises:
        ValueError: the batch has fewer than two prompts.
    """
    z1, z2 = (gaussian_sample(code.mu, code.sigma, generator) for code in codes)
    skl = symmetric_kl(*codes[0], *codes[1]).mean()
    if objective == "contrastive":
        loss = info_nce(z1, z2)
        mi = math.log(len(z1)) - loss
    else:
        pairs = [(views[0], z1), (views[1], z2)] if objective == "infomax" else [(z1, z2)]
        scores = [score_pairs(score, a, b) for a, b in pairs]
        joint, product = (torch.cat(column) for column in zip(*scores, strict=True))
        loss, mi = -jensen_shannon_mi(joint, product), mi_nats(joint, product)
    if objective == "uml":
        loss = loss + skl_weight * skl
    return MultiViewLoss(loss=loss, mi=mi.detach(), skl=skl.detach())
