"""Losses on codes of responses: RLP's unsupervised multi-view learning with its ablations, and InfoRM's bottleneck.

Multi-view learning adds an auxiliary loss on two views of one prompt. A view v is the reward model's last hidden state
of one response to the prompt. A code is the Gaussian p(z | v) that an encoder makes of a view, and a critic T scores
pairs of codes, or of a view and a code (encoder and critic are in `rayrl.models.view_networks`). RLP (arXiv 2403.19279,
Sec. 4.2) adds lambda = 0.5 times `uml_loss` to the preference loss, with I(z1; z2) estimated as in Deep InfoMax and the
loss as in the multi-view information bottleneck (arXiv 2002.07017).

Row i of every batch of views belongs to prompt i. Negative pairs join neighbouring rows, so the rows must be of
different prompts, and a batch has at least two.

A bottleneck (`bottleneck_losses`) reads the reward itself off a code (`rayrl.models.bottleneck`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from rayrl.algorithms.preference import bradley_terry_loss

Score = Callable[[Tensor, Tensor], Tensor]
"""A critic T(a, b): one score per row of two batches."""


class Gaussian(NamedTuple):
    """One diagonal Gaussian per row."""

    mu: Float[Tensor, "batch z"]
    sigma: Float[Tensor, "batch z"]
    """Standard deviations, positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiViewLoss:
    """The loss to minimise, and two detached numbers to log."""

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
    joint_term = -softplus(-joint_scores).mean()
    product_term = softplus(product_scores).mean()
    return joint_term - product_term


def mi_nats(joint_scores: Float[Tensor, "n"], product_scores: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """E_joint[T] - E_product[exp T] + 1: a lower bound on mutual information, nats, exact at T* = log joint / product.

    This is the bound of Nguyen, Wainwright and Jordan read with the critic that `jensen_shannon_mi` trains (arXiv
    1905.06922, Sec. 2), and the value that the release of arXiv 2002.07017 logs. One batch's value may exceed the true
    information, and exp T makes it noisy beyond a few nats: log it, do not train on it.
    """
    return joint_scores.mean() - product_scores.exp().mean() + 1


def rolled(rows: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    """Move the batch down by one row: beside another batch, it gives samples from the product of the marginals.

    Raises:
        ValueError: the batch has fewer than two rows, so that a row would meet itself.
    """
    _refuse_one_prompt(rows)
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

    1/4 sum_d [(s1^2 + D^2) / s2^2 + (s2^2 + D^2) / s1^2 - 2] with D = mu1 - mu2. The release of arXiv 2002.07017
    estimates it from one sample of each code.
    """
    # The same as a sum of squares, s1^2 / s2^2 + s2^2 / s1^2 - 2 = (s1 / s2 - s2 / s1)^2: nothing cancels, and the
    # result is never negative.
    spread = (sigma1 / sigma2 - sigma2 / sigma1).square()
    shift = (mu1 - mu2).square() * (sigma1**-2 + sigma2**-2)
    return (spread + shift).sum(-1) / 4


def kl_to_standard_normal(mu: Float[Tensor, "batch z"], sigma: Float[Tensor, "batch z"]) -> Float[Tensor, "batch"]:
    """KL(N(mu, diag sigma^2) || N(0, I)) = sum_d [(mu^2 + sigma^2 - 1) / 2 - log sigma], nats per row."""
    return ((mu.square() + sigma.square() - 1) / 2 - sigma.log()).sum(-1)


def bottleneck_losses(
    chosen: Float[Tensor, "batch"], rejected: Float[Tensor, "batch"], codes: tuple[Gaussian, Gaussian], *, beta: float
) -> Float[Tensor, "batch"]:
    """-log sigma(r(z_w) - r(z_l)) + beta (KL(p(z | x_w) || N(0, I)) + KL(p(z | x_l) || N(0, I))), for each pair.

    The reward model of InfoRM (arXiv 2402.09345): the divergences bound from above what the codes tell of the responses
    (arXiv 1612.00410), the preference loss what they tell of the preference. Its release takes the divergence of the
    dimensions' means instead of the sum over dimensions of the paper.

    Args:
        chosen: rewards of a sample of the chosen responses' codes.
        rejected: the same of the rejected ones.
        codes: of the chosen responses, and of the rejected ones.
        beta: loss per nat.
    """
    chosen_code, rejected_code = codes
    divergence = kl_to_standard_normal(*chosen_code) + kl_to_standard_normal(*rejected_code)
    return bradley_terry_loss(chosen, rejected) + beta * divergence


def warmed_up(progress: float, *, start: float, begin: float, end: float) -> float:
    """Factor of the divergence's weight at a share of the training: `start`, then exponentially up to 1.

    The release of arXiv 2002.07017 raises the weight so, from 1e-3 to 1. With all of it from the first step on, codes
    without information are near, and are found before the critic tells joint pairs from others.

    Args:
        progress: share of the training's steps that are done.
        start: factor until `begin`.
        begin: share at which the rise begins.
        end: share from which the factor is 1.
    """
    if progress < begin:
        return start
    if progress >= end:
        return 1.0
    return start ** (1 - (progress - begin) / (end - begin))


def gaussian_sample(
    mu: Float[Tensor, "batch z"], sigma: Float[Tensor, "batch z"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch z"]:
    """One sample mu + sigma eps, eps ~ N(0, 1), per row, differentiable in mu and sigma (arXiv 1312.6114).

    The generator, torch's own when None, must live on the device of `mu`.
    """
    eps = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + sigma * eps


def info_nce(z1: Float[Tensor, "batch z"], z2: Float[Tensor, "batch z"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Cross-entropy of finding row i of one batch among all rows of the other, averaged over both directions.

    Eq. 4 of arXiv 1807.03748 with cosine similarity / temperature as the score. log(batch) minus it is a lower bound
    on I(z1; z2) in nats (Eq. 5), which therefore never shows more than log(batch).

    Raises:
        ValueError: the batch has fewer than two rows.
    """
    _refuse_one_prompt(z1)
    cosines = normalize(z1, dim=-1) @ normalize(z2, dim=-1).T  # (batch, batch)
    logits = cosines / temperature
    partners = torch.arange(len(z1), device=z1.device)  # row i of one batch belongs to row i of the other
    return (cross_entropy(logits, partners) + cross_entropy(logits.T, partners)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledViews:
    """Input of an objective: a batch of two views of each prompt, with one sample of each view's code."""

    views: tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]
    samples: tuple[Float[Tensor, "batch z"], Float[Tensor, "batch z"]]
    """z1 and z2."""
    score: Score
    """The critic."""
    skl: Float[Tensor, ""]
    """Mean symmetrised divergence of the two codes, nats."""
    skl_weight: float


def uml_objective(batch: SampledViews) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-I(z1; z2) + skl_weight SKL(p(z | v1), p(z | v2)): RLP's L_M."""
    loss, mi = mvi_objective(batch)
    return loss + batch.skl_weight * batch.skl, mi


def mvi_objective(batch: SampledViews) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-I(z1; z2): without the divergence."""
    z1, z2 = batch.samples
    joint_scores, product_scores = score_pairs(batch.score, z1, z2)
    return -jensen_shannon_mi(joint_scores, product_scores), mi_nats(joint_scores, product_scores)


def infomax_objective(batch: SampledViews) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-I(v; z), averaged over both views: nothing ties the views together."""
    (v1, v2), (z1, z2) = batch.views, batch.samples
    joint_scores1, product_scores1 = score_pairs(batch.score, v1, z1)
    joint_scores2, product_scores2 = score_pairs(batch.score, v2, z2)
    joint_scores = torch.cat([joint_scores1, joint_scores2])  # (2 batch,)
    product_scores = torch.cat([product_scores1, product_scores2])
    return -jensen_shannon_mi(joint_scores, product_scores), mi_nats(joint_scores, product_scores)


def contrastive_objective(batch: SampledViews) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`info_nce` of z1 and z2; it never calls the critic.

    The paper writes "a contrastive learning loss" and cites SwAV (arXiv 2006.09882), whose loss has prototypes and no
    explicit negatives. The positive pairs here are the paper's, the loss is the common one.
    """
    z1, z2 = batch.samples
    loss = info_nce(z1, z2)
    return loss, math.log(len(z1)) - loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """An auxiliary loss of two views."""

    compute: Callable[[SampledViews], tuple[Tensor, Tensor]]
    """Returns the loss of a batch, and the batch's estimate of the mutual information that it maximises, nats."""
    scores_views: bool = False
    """Whether the critic scores a view with a code, T(v, z), instead of two codes, T(z1, z2)."""


UML_OBJECTIVES: dict[str, Objective] = {
    "uml": Objective(compute=uml_objective),
    "mvi": Objective(compute=mvi_objective),
    "infomax": Objective(compute=infomax_objective, scores_views=True),
    "contrastive": Objective(compute=contrastive_objective),
}
"""Values of `refresh.uml.objective`, which repeats these names: a config must load without torch. A test keeps the two
equal."""


def uml_loss(
    views: tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]],
    codes: tuple[Gaussian, Gaussian],
    score: Score,
    *,
    objective: str = "uml",
    skl_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> MultiViewLoss:
    """RLP's L_M (arXiv 2403.19279, Sec. 4.2), or one of the losses its Table 4 puts in its place.

    Args:
        views: Inputs of the encoder; only "infomax" reads them. Detach them to keep the critic from reaching the
            reward model past the encoder.
        codes: The encoder's outputs for the two views.
        score: The critic: T(z1, z2), for "infomax" T(v, z).
        objective: A name in `UML_OBJECTIVES`.
        skl_weight: Weight of the divergence in "uml". 1 in RLP; `warmed_up` raises it while the model trains.
        generator: Draws the samples.

    Raises:
        ValueError: the batch has fewer than two prompts.
    """
    code1, code2 = codes
    # In this order: a generator gives the first view's code the first draw.
    z1 = gaussian_sample(code1.mu, code1.sigma, generator)
    z2 = gaussian_sample(code2.mu, code2.sigma, generator)
    skl = symmetric_kl(code1.mu, code1.sigma, code2.mu, code2.sigma).mean()
    batch = SampledViews(views=views, samples=(z1, z2), score=score, skl=skl, skl_weight=skl_weight)
    loss, mi = UML_OBJECTIVES[objective].compute(batch)
    return MultiViewLoss(loss=loss, mi=mi.detach(), skl=skl.detach())


def _refuse_one_prompt(rows: Float[Tensor, "batch d"]) -> None:
    if len(rows) < 2:
        raise ValueError(f"negative pairs need a batch of at least 2 prompts, got {len(rows)}")
