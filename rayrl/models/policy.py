"""Policy: a causal language model, its low-rank adapters, and the log-probabilities that it gives to responses."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rayrl.algorithms.preference import sequence_logprobs, token_logprobs
from rayrl.config import LoraConfig
from rayrl.errors import ConfigError
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
    from transformers import AutoConfig, AutoModelForCausalLM

    path, revision = local_folder(checkpoint.path), checkpoint.revision or "main"
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        attn_implementation=attention_of(config.get_text_config()),
    )


def attention_of(text_config: object) -> str | None:
    """Return the attention that computes all of a model's config; None is transformers' own choice for the family.

    That choice is torch's fused attention wherever a family runs with it. A soft cap of the scores (Gemma-2) is not
    part of it, and would be left out without a word.
    """
    has_soft_cap = getattr(text_config, "attn_logit_softcapping", None) is not None
    return "eager" if has_soft_cap else None


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0, dropped layers included.

    Losses on the ratio of two policies need it: noise of the dropout in one of them biases the ratio. Unlike evaluation
    mode, it leaves gradient checkpointing on.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # Attention reads its share from a number of its own: `attention_dropout`, `dropout`, `layerdrop`.
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_lora(model: "PreTrainedModel", lora: LoraConfig) -> "PeftModel":
    """Freeze a model and add low-rank adapters to it.

    Raises:
        ConfigError: a target is no linear layer of the model.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model
    from transformers.pytorch_utils import Conv1D

    # By name: for "all-linear", peft would also adapt the experts of a mixture, which are no linear layers.
    linear = linear_names(model)
    targets = linear if lora.target_modules == "all-linear" else lora.target_modules
    others = sorted(set(targets) - set(linear))
    if others:
        raise ConfigError(
            f"lora.target_modules must name linear layers of the model, got {', '.join(others)}; its linear layers are "
            f"{', '.join(linear)}"
        )
    adapted = get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            # GPT-2's layers keep their weights as (in, out).
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        ),
    )
    assert isinstance(adapted, PeftModel), "only several adapters at once make a PeftMixedModel"
    return adapted


def linear_names(model: "PreTrainedModel") -> list[str]:
    """Return the names of a model's linear layers, as they are called in every block; the output head is left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            names.append(name.rpartition(".")[2])
    return sorted(set(names))


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
