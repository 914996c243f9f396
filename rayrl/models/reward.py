"""Reward models and scalar evaluators: a causal language model's last hidden states, pooled, and a one-output head."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear


class Float32Linear(nn.Linear):
    """A linear layer computed in float32; its weights are bfloat16 where DeepSpeed trains in bfloat16."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input.float(), self.weight.float(), self.bias.float())


class RewardModel(nn.Module):
    """r(x, y) = w . pool(h(x, y)) + b. The head starts at zero: before training every response is worth the same."""

    def __init__(self, backbone: Any, pooling: Literal["mean", "last"]):
        super().__init__()
        self.backbone = backbone
        self.pooling: Literal["mean", "last"] = pooling
        hidden_size = backbone.config.get_text_config().hidden_size
        self.head = Float32Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Float[Tensor, "batch"]:
        return self.head(self.pooled(input_ids, attention_mask, position_ids)).squeeze(-1)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Float[Tensor, "batch hidden"]:
        """What the head reads, in float32."""
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=1,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states[-1]
        return pool(hidden.float(), attention_mask, self.pooling)


def pool(
    hidden: Float[Tensor, "batch seq hidden"], attention_mask: Tensor, pooling: Literal["mean", "last"]
) -> Float[Tensor, "batch hidden"]:
    """The mean over real tokens, or the last real token's vector: what the embedding engines compute."""
    mask = attention_mask.to(hidden.dtype)
    if pooling == "mean":
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * columns).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
