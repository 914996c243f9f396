"""Reward model: a causal language model's last hidden states, pooled, under a head with one output.

Scalar evaluators have the same form. The embedding engines serve both: they compute the same pooled state, and the head
is applied to it outside of the engine.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayrl.algorithms.information import Gaussian
from rayrl.models.bottleneck import BottleneckHead
from rayrl.models.packing import Sequences, hidden_states
from rayrl.models.scalar_head import zero_head

if TYPE_CHECKING:
    from rayrl.models.packing import Backbone

Pooling = Literal["mean", "last"]


class RewardModel(nn.Module):
    """r(x, y) = w . pool(h(x, y)) + b. The head starts at zero: before training every response has the same reward.

    With `z_dim` the head is a bottleneck, whose mean has a reward of the same form.
    """

    def __init__(self, backbone: "Backbone", pooling: Pooling, z_dim: int | None = None):
        super().__init__()
        self.backbone = backbone
        self.pooling: Pooling = pooling
        self.hidden_size: int = backbone.config.get_text_config().hidden_size
        self.head = zero_head(backbone) if z_dim is None else BottleneckHead(self.hidden_size, z_dim)

    def forward(self, batch: Sequences) -> Float[Tensor, "batch"]:
        return self.head(self.pooled(batch)).squeeze(-1)

    def sampled(self, batch: Sequences, seed: int) -> tuple[Float[Tensor, "batch"], Gaussian]:
        """Return the rewards of samples of the bottleneck's codes, drawn by a seed, and the codes."""
        assert isinstance(self.head, BottleneckHead), "only a bottleneck has codes"
        pooled = self.pooled(batch)
        rewards, codes = self.head.sampled(pooled, torch.Generator(pooled.device).manual_seed(seed))
        return rewards.squeeze(-1), codes

    def pooled(self, batch: Sequences) -> Float[Tensor, "batch hidden"]:
        """Return the input of the head, in float32."""
        return pool(hidden_states(self.backbone, batch).float(), batch.lengths, self.pooling)


def pool(
    hidden: Float[Tensor, "tokens hidden"], lengths: Sequence[int], pooling: Pooling
) -> Float[Tensor, "batch hidden"]:
    """Return each sequence's mean over tokens, or its last token's vector, as the embedding engines compute them."""
    sequences = hidden.split(tuple(lengths))
    if pooling == "mean":
        return torch.stack([states.mean(0) for states in sequences])
    return torch.stack([states[-1] for states in sequences])
