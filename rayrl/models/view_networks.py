"""Networks of multi-view learning: an encoder of views to Gaussian codes, and a critic of pairs.

Their loss is in `rayrl.algorithms.information`. They are a branch beside the reward head, used in training only. RLP
(arXiv 2403.19279, Sec. 5.3) states that mu and sigma are two MLPs of three layers. It gives neither their sizes nor the
critic; those here are the defaults of the release of arXiv 2002.07017, which has one MLP for mu and sigma together.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from rayrl.algorithms.information import Gaussian
from rayrl.models.scalar_head import Float32Linear

MIN_SIGMA = 1e-7
"""Keeps the divergence of two codes finite; the value is from the release of arXiv 2002.07017."""


class GaussianEncoder(nn.Module):
    """p(z | v) = N(mu(v), diag sigma(v)^2), in float32 whatever the backbone's precision."""

    def __init__(self, input_dim: int, z_dim: int = 64, hidden_dim: int = 1024):
        super().__init__()
        self.mu = _mlp(input_dim, hidden_dim, z_dim)
        self.sigma = _mlp(input_dim, hidden_dim, z_dim)

    def forward(self, views: Float[Tensor, "batch hidden"]) -> Gaussian:
        views = views.float()  # the backbone's may be bfloat16
        return Gaussian(mu=self.mu(views), sigma=softplus(self.sigma(views)) + MIN_SIGMA)


class Critic(nn.Module):
    """T(a, b): a three-layer MLP on the concatenation, one unbounded score per row, in float32."""

    def __init__(self, first_dim: int, second_dim: int, hidden_dim: int = 1024):
        super().__init__()
        self.net = _mlp(first_dim + second_dim, hidden_dim, 1)

    def forward(self, a: Float[Tensor, "batch d"], b: Float[Tensor, "batch e"]) -> Float[Tensor, "batch"]:
        both = torch.cat([a.float(), b.float()], -1)
        return self.net(both).squeeze(-1)


def _mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    # Three layers, as in the paper.
    return nn.Sequential(
        Float32Linear(input_dim, hidden_dim),
        nn.ReLU(),
        Float32Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        Float32Linear(hidden_dim, output_dim),
    )
