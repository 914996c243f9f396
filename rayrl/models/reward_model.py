"""Reward model: a causal language model's last hidden states, pooled, under a head with one output.

Scalar evaluators have the same form. The embedding engines serve both: they compute the same pooled state, and the head
is applied to it outside of the engine.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayrl.models.packing import Sequences, hidden_states
from rayrl.models.scalar_head import zero_head

if TYPE_CHECKING:
    from rayrl.models.packing import Backbone

Pooling = Literal["mean", "last"]


class RewardModel(nn.Module):
    """r(x, y) = w . pool(h(x, y)) + b. The head starts at zero: before training every response has the same reward."""

    def __init__(self, backbone: "Backbone", pooling: Pooling):
        super().__init__()
        self.backbone = backbone
        self.pooling: Pooling = pooling
        self.head = zero_head(backbone)

    def forward(self, batch: Sequences) -> Float[Tensor, "batch"]:
        return self.head(self.pooled(batch)).squeeze(-1)

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
