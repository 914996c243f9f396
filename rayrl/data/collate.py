"""Token rows to tensors.

Prompts are padded on the left and responses on the right, so that every response starts in the same column and the
model computes logits for response positions only (`logits_to_keep`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses of one micro-batch; B sequences, P prompt columns, R response columns."""

    input_ids: Int[Tensor, "B P+R"]
    attention_mask: Int[Tensor, "B P+R"]
    position_ids: Int[Tensor, "B P+R"]
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]

    @property
    def num_tokens(self) -> int:
        """Tokens in it, padding left out."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(prompts: list[list[int]], responses: list[list[int]]) -> TokenBatch:
    """Pad prompts left and responses right. The padding id is 0: it is masked wherever it stands."""
    num_prompt = max(map(len, prompts))
    num_response = max(map(len, responses))
    rows = list(zip(prompts, responses, strict=True))
    input_ids = torch.tensor([[0] * (num_prompt - len(p)) + p + r + [0] * (num_response - len(r)) for p, r in rows])
    attention_mask = torch.tensor(
        [[0] * (num_prompt - len(p)) + [1] * (len(p) + len(r)) + [0] * (num_response - len(r)) for p, r in rows]
    )
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        response_ids=input_ids[:, num_prompt:],
        response_mask=attention_mask[:, num_prompt:].bool(),
    )
