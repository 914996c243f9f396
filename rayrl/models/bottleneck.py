"""Reward head with a variational information bottleneck: it reads the reward off a Gaussian code of the hidden state.

The head of InfoRM (arXiv 2402.09345), whose loss is `rayrl.algorithms.information.bottleneck_losses`. Encoder and
decoder are linear, as by default in its release. Training reads a sample of the code; afterwards the reward is that of
its mean, which is linear in the hidden state: it is exported as any other head, and served so.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayrl.algorithms.information import Gaussian, gaussian_sample
from rayrl.models.scalar_head import Float32Linear


class BottleneckHead(nn.Module):
    """r = v . z + c with z ~ N(mu(h), diag sigma(h)^2), in float32.

    The decoder starts at zero, and sigma at 1, the prior's.
    """

    def __init__(self, hidden_size: int, z_dim: int):
        super().__init__()
        self.mu = Float32Linear(hidden_size, z_dim)
        self.log_variance = Float32Linear(hidden_size, z_dim)
        self.decoder = Float32Linear(z_dim, 1)
        for layer in (self.log_variance, self.decoder):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch 1"]:
        """Return the reward of the mean code."""
        return self.decoder(self.mu(pooled))

    def sampled(
        self, pooled: Float[Tensor, "batch hidden"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch 1"], Gaussian]:
        """Return the reward of one sample of each code, and the codes."""
        code = Gaussian(mu=self.mu(pooled), sigma=(self.log_variance(pooled) / 2).exp())
        return self.decoder(gaussian_sample(code.mu, code.sigma, generator)), code


def linear_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join a `BottleneckHead`'s encoder of the mean and its decoder to one linear head, computed in float64.

    Returns:
        "weight" (1, hidden) and "bias" (1,).
    """
    exact = {name: weight.double() for name, weight in weights.items()}
    weight = exact["decoder.weight"] @ exact["mu.weight"]
    bias = exact["decoder.weight"] @ exact["mu.bias"] + exact["decoder.bias"]
    return {"weight": weight.float(), "bias": bias.float()}
