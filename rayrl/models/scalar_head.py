"""Scalar heads on a causal language model: the last hidden states, and a linear layer that reads one number off each.

Reward models read one pooled state of a sequence, value functions the state before each token.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Backbone = PreTrainedModel | PeftModel


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


def last_hidden_states(
    backbone: "Backbone", input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
) -> Float[Tensor, "batch seq hidden"]:
    """Return the hidden states of the last layer."""
    output = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        logits_to_keep=1,  # as few as the model lets one ask for: nothing reads the logits
        output_hidden_states=True,
        use_cache=False,
    )
    return output.hidden_states[-1]
