"""Reward model: a causal language model's last hidden states, pooled, under a head with one output.

Scalar evaluators have the same form. The embedding engines serve both: they compute the same pooled state, and the head
is applied to it outside of the engine.
"""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayrl.models.scalar_head import last_hidden_states, zero_head

if TYPE_CHECKING:
    from rayrl.models.scalar_head import Backbone

Pooling = Literal["mean", "last"]


class RewardModel(nn.Module):
    """r(x, y) = w . pool(h(x, y)) + b. The head starts at zero: before training every response has the same reward."""

    def __init__(self, backbone: "Backbone", pooling: Pooling):
        super().__init__()
        self.backbone = backbone
        self.pooling: Pooling = pooling
        self.head = zero_head(backbone)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Float[Tensor, "batch"]:
        return self.head(self.pooled(input_ids, attention_mask, position_ids)).squeeze(-1)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Float[Tensor, "batch hidden"]:
        """Return the input of the head, in float32."""
        hidden = last_hidden_states(self.backbone, input_ids, attention_mask, position_ids)
        return pool(hidden.float(), attention_mask, self.pooling)


def pool(
    hidden: Float[Tensor, "batch seq hidden"], attention_mask: Tensor, pooling: Pooling
) -> Float[Tensor, "batch hidden"]:
    """Return the mean over real tokens, or the last real token's vector, as the embedding engines compute them."""
    if pooling == "mean":
        mask = attention_mask.to(hidden.dtype)
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    # Padding may stand on either side, so the last real token is not always in the last column.
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * columns).argmax(1)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last]
