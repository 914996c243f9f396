"""The policy: loading it, and the log-probability it gives a response."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rayrl.algorithms.preference import sequence_logprobs
from rayrl.config import LoraConfig


def load_policy(path: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A causal language model from a local folder or hub id, safetensors only."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, attn_implementation="sdpa"
    )


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Freeze the model and add low-rank adapters to it."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    return get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def response_logprobs(model: nn.Module, batch: Any) -> Float[Tensor, "batch"]:
    """Summed log p(response | prompt) of a `TokenBatch`, nats."""
    num_response = batch.response_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=num_response + 1,
        use_cache=False,
    ).logits
    return sequence_logprobs(logits[:, :-1], batch.response_ids, batch.response_mask)
