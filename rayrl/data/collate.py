"""Tensors of one micro-batch from rows of tokens: sequences one behind the other, without padding.

Whether a model reads them so or padded is decided in `rayrl.models.packing`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PAD_ID = 0
"""Any id does: padding is masked wherever it is read."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their responses: B sequences of N tokens in all, M of them in responses, R in the longest one."""

    input_ids: Int[Tensor, "N"]
    position_ids: Int[Tensor, "N"]
    """From 0 in each sequence."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    response_ids: Int[Tensor, "B R"]
    """Padded on the right."""
    response_mask: Bool[Tensor, "B R"]
    predicting: Int[Tensor, "M"]
    """Place in `input_ids` of the token before each response token, in the order of `response_mask`."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> "TokenBatch":
        return replace(
            self, **{name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        )


def collate(prompts: list[list[int]], responses: list[list[int]]) -> TokenBatch:
    """Join prompts and responses to sequences.

    Log-probabilities of a response need a prompt of at least one token, which predicts the response's first.
    """
    ids: list[int] = []
    lengths: list[int] = []
    predicting: list[Tensor] = []
    for prompt, response in zip(prompts, responses, strict=True):
        # A token is predicted at the place before its own; the response's last token predicts nothing that is read.
        first = len(ids) + len(prompt) - 1
        predicting.append(torch.arange(first, first + len(response)))
        lengths.append(len(prompt) + len(response))
        ids += prompt + response
    rows = [torch.tensor(response, dtype=torch.int64) for response in responses]
    return TokenBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        response_ids=pad_sequence(rows, batch_first=True, padding_value=PAD_ID),
        response_mask=pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True),
        predicting=torch.cat(predicting),
    )


def sequence_batch(sequences: list[list[int]]) -> TokenBatch:
    """Collate whole sequences, for models that read no response."""
    return collate(sequences, [[] for _ in sequences])
