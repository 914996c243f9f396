"""Policy: a causal language model, its low-rank adapters, and the log-probabilities that it gives to responses."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rayrl.algorithms.preference import sequence_logprobs, token_logprobs
from rayrl.config import LoraConfig
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CausalLM = Callable[..., Any]
"""A causal language model as transformers makes it, with adapters or without, or an engine around one. Called with
tokens it returns an output that has `logits`."""


class PaddedResponses(Protocol):
    """Prompts and responses of one micro-batch: the part of `rayrl.data.collate.TokenBatch` that models read.

    All responses start in the same column, behind their prompts.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def response_ids(self) -> Tensor: ...
    @property
    def response_mask(self) -> Tensor: ...


def load_policy(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Load a causal language model from a folder, a URL or the hub; from safetensors only.

    Pickled weights are refused, since loading them can run code.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        local_folder(checkpoint.path),
        revision=checkpoint.revision or "main",
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        attn_implementation="sdpa",
    )


def add_lora(model: "PreTrainedModel", lora: LoraConfig) -> "PeftModel":
    """Freeze a model and add low-rank adapters to it."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model

    adapted = get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    assert isinstance(adapted, PeftModel), "only several adapters at once make a PeftMixedModel"
    return adapted


def response_logprobs(model: CausalLM, batch: PaddedResponses) -> Float[Tensor, "batch"]:
    """Return log p(response | prompt) of each row, summed over the response's tokens, nats."""
    return sequence_logprobs(_response_logits(model, batch), batch.response_ids, batch.response_mask)


def response_token_logprobs(model: CausalLM, batch: PaddedResponses) -> Float[Tensor, "batch seq"]:
    """Return log pi(y_t | x, y_<t) of each response token, nats; padding holds arbitrary numbers."""
    return token_logprobs(_response_logits(model, batch), batch.response_ids)


def _response_logits(model: CausalLM, batch: PaddedResponses) -> Float[Tensor, "batch seq vocab"]:
    """Return the logits that predict the response's tokens; no others are computed, as the vocabulary is large."""
    num_response = batch.response_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=num_response + 1,
        use_cache=False,
    ).logits
    # A token is predicted in the column before its own; the last column predicts what follows the response.
    return logits[:, :-1]
