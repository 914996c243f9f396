"""The two networks of `rayrl.algorithms.information`: an encoder of views into Gaussian codes, and a critic of pairs.

They are a branch beside the reward head, used in training only. RLP (arXiv 2403.19279, Sec. 5.3) says that mu and sigma
are two three-layer MLPs and leaves out the sizes and the critic; those here are the defaults of arXiv 2002.07017's
release, which has one MLP for mu and sigma together.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from rayrl.algorithms.information import Gaussian
from rayrl.models.reward import Float32Linear

MIN_SIGMA = 1e-7
"""Keeps the divergence of two codes finite; that of arXiv 2002.07017's release."""


class GaussianEncoder(nn.Module):
    """p(z | v) = N(mu(v), diag sigma(v)^2), in float32 whatever the backbone's precision."""

    def __init__(self, input_dim: int, z_dim: int = 64, hidden_dim: int = 1024):
        super().__init__()
        self.mu = _mlp(input_dim, hidden_dim, z_dim)
        self.sigma = _mlp(input_dim, hidden_dim, z_dim)

    def forward(self, views: Float[Tensor, "batch hidden"]) -> Gaussian:
        views = views.float()
        return Gaussian(mu=self.mu(views), sigma=softplus(self.sigma(views)) + MIN_SIGMA)


class Critic(nn.Module):
    """T(a, b): a three-layer MLP on the concatenation, one unbounded score per row, in float32."""

    def __init__(self, first_dim: int, second_dim: int, hidden_dim: int = 1024):
        super().__init__()
        self.net = _mlp(first_dim + second_dim, hidden_dim, 1)

    def forward(self, a: Float[Tensor, "batch d"], b: Float[Tensor, "batch e"]) -> Float[Tensor, "batch"]:
        return self.net(torch.cat([a.float(), b.float()], -1)).squeeze(-1)


def _mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    return nn.Sequential(
        Float32Linear(input_dim, hidden_dim),
        nn.ReLU(),
        Float32Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        Float32Linear(hidden_dim, output_dim),
    )
