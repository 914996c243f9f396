"""Tensors of one micro-batch from rows of tokens.

Prompts are padded on the left and responses on the right, so that every response starts in the same column and the
model computes logits for response positions only (`logits_to_keep`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD_ID = 0
"""Any id does: padding is masked wherever it is read."""


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
        return TokenBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            response_ids=self.response_ids.to(device),
            response_mask=self.response_mask.to(device),
        )


def collate(prompts: list[list[int]], responses: list[list[int]]) -> TokenBatch:
    """Pad prompts left and responses right."""
    longest_prompt = max(map(len, prompts))
    longest_response = max(map(len, responses))
    id_rows: list[list[int]] = []
    mask_rows: list[list[int]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        num_left = longest_prompt - len(prompt)
        num_right = longest_response - len(response)
        id_rows.append([PAD_ID] * num_left + prompt + response + [PAD_ID] * num_right)
        mask_rows.append([0] * num_left + [1] * (len(prompt) + len(response)) + [0] * num_right)
    input_ids = torch.tensor(id_rows)
    attention_mask = torch.tensor(mask_rows)
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        # Positions count real tokens only; left padding comes out as -1, which no embedding table has.
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        response_ids=input_ids[:, longest_prompt:],
        response_mask=attention_mask[:, longest_prompt:].bool(),
    )
