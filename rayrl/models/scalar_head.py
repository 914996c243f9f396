"""Scalar heads on a causal language model: a linear layer that reads one number off each of its last hidden states.

Reward models read one pooled state of a sequence, value functions the state before each token.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from rayrl.models.packing import Backbone


class Float32Linear(nn.Linear):
    """A linear layer computed in float32; its weights are bfloat16 where DeepSpeed trains in bfloat16."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input.float(), self.weight.float(), self.bias.float())


def zero_head(backbone: "Backbone") -> Float32Linear:
    """Make a head for a backbone's hidden states whose value is 0 for each of them, until it is trained."""
    head = Float32Linear(backbone.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
