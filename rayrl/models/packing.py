"""Hidden states of sequences of different lengths, read one behind the other without padding where the model can do so.

Packed, a sequence attends to itself alone. Flash attention finds the sequences by their positions; torch's attention is
called once for each of them, which needs no mask: on a CPU that was faster than any padding (jobs/bench/RESULTS.md).
Other attentions (Gemma-2's and gpt-oss's own), recurrent layers, and models whose attention does not take named
arguments read rows padded on the right. Causal attention never reads what stands on the right, so that needs no mask
either.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Backbone = PreTrainedModel | PeftModel

SEQUENCE_ATTENTION = "rayrl_sequence_attention"
"""Name of `sequence_attention` in transformers. Without `sequence_lengths` it is transformers' "sdpa"."""
PACKED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that may be packed, as `layer_types` of a model's configuration has them."""


class Sequences(Protocol):
    """The part of `rayrl.data.collate.TokenBatch` that a backbone reads."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...


def causal_lm(model: "Backbone") -> "PreTrainedModel":
    """Return the transformers model inside of its adapters, if it has any; they stay in its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator, return-value]


def is_packed(model: "Backbone") -> bool:
    """Return whether `hidden_states` packs a model's sequences; otherwise it pads them."""
    model = causal_lm(model)
    config = model.config.get_text_config()
    attention = config._attn_implementation or ""
    # What flash attention supports, every mask apart from padding can be told by arguments.
    takes_arguments = model._supports_attention_backend and model._supports_flash_attn and not model._is_stateful
    layer_types = set(getattr(config, "layer_types", None) or PACKED_LAYERS)
    is_known = attention in ("sdpa", SEQUENCE_ATTENTION) or attention.startswith("flash_attention")
    return is_known and takes_arguments and layer_types <= PACKED_LAYERS


def hidden_states(model: "Backbone", batch: Sequences) -> Float[Tensor, "tokens hidden"]:
    """Return the last layer's states of all tokens, in the order of `batch.input_ids`. No logits are computed."""
    body = causal_lm(model).get_decoder()
    return _outputs_by_token(model, batch, lambda **inputs: body(**inputs).last_hidden_state)


def all_logits(model: "Backbone", batch: Sequences) -> Float[Tensor, "tokens vocab"]:
    """Return the logits after all tokens, in the order of `batch.input_ids`."""
    whole = causal_lm(model)
    return _outputs_by_token(model, batch, lambda **inputs: whole(**inputs).logits)


def _outputs_by_token(model: "Backbone", batch: Sequences, read: Callable[..., Tensor]) -> Tensor:
    """Return an output of the model for every token, (N, *).

    A model with torch's attention keeps `sequence_attention` from then on: gradient checkpointing calls it again in the
    backward pass.
    """
    if not is_packed(model):
        rows = pad_sequence(list(batch.input_ids.split(batch.lengths)), batch_first=True)  # (B, T)
        lengths = torch.tensor(batch.lengths, device=rows.device)
        is_real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]  # (B, T)
        return read(input_ids=rows, use_cache=False)[is_real]
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    if (causal_lm(model).config._attn_implementation or "").startswith("flash_attention"):
        return read(input_ids=ids, position_ids=positions, use_cache=False)[0]
    _use_sequence_attention(causal_lm(model))
    return read(
        input_ids=ids,
        position_ids=positions,
        # Instead of a mask of all pairs of tokens: one with four dimensions is passed on as it is, and not read.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        sequence_lengths=batch.lengths,
        use_cache=False,
    )[0]


def _use_sequence_attention(model: "PreTrainedModel") -> None:
    if model.config._attn_implementation == SEQUENCE_ATTENTION:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SEQUENCE_ATTENTION, sequence_attention)
    AttentionMaskInterface.register(SEQUENCE_ATTENTION, sdpa_mask)
    model.set_attn_implementation(SEQUENCE_ATTENTION)


def sequence_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 key_heads tokens dim"],
    value: Float[Tensor, "1 key_heads tokens dim"],
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend within each of some sequences that stand one behind the other: transformers' attention by torch.

    Args:
        module: the model's attention layer.
        query: of all sequences.
        key: of all sequences.
        value: of all sequences.
        attention_mask: of the pairs of tokens; not read with `sequence_lengths`.
        sequence_lengths: of the sequences; None is one call as the model means it.
        sliding_window: tokens that a token attends to, itself included; None is all before it.
        arguments: as they are, to each sequence's attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)  # type: ignore[return-value]
    outputs: list[Tensor] = []
    parts = (tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value))
    for length, q, k, v in zip(sequence_lengths, *parts, strict=True):
        mask = None  # causal
        if sliding_window is not None and length > sliding_window:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = ((distance >= 0) & (distance < sliding_window))[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **arguments)[0])
    return torch.cat(outputs, dim=1), None  # (1, tokens, heads, dim)
