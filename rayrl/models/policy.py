"""Policy: a causal language model, its low-rank adapters, and the log-probabilities that it gives to responses."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayrl.algorithms.batching import LOGIT_BYTES
from rayrl.algorithms.preference import log_collisions, token_logprobs
from rayrl.config import LoraConfig
from rayrl.errors import ConfigError
from rayrl.models.packing import Sequences, all_logits, causal_lm, hidden_states
from rayrl.models.quantization import quantize
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

    from rayrl.models.packing import Backbone

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Names in a message."""

ReadLogits = Callable[[Tensor, Tensor], Tensor]
"""(logits of tokens, the tokens) -> what is read of each, such as its log-probability."""


class Responses(Sequences, Protocol):
    """Prompts and responses of one micro-batch: the part of `rayrl.data.collate.TokenBatch` that a policy reads."""

    @property
    def response_ids(self) -> Tensor: ...
    @property
    def response_mask(self) -> Tensor: ...
    @property
    def predicting(self) -> Tensor: ...


def load_policy(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Load a causal language model from a folder, a URL or the hub; from safetensors only.

    Pickled weights are refused, since loading them can run code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path, revision = local_folder(checkpoint.path), checkpoint.revision or "main"
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        attn_implementation=attention_of(config.get_text_config()),
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, found = loaded
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ConfigError(
            f"policy.path must hold all weights of a {type(model).__name__}, got {checkpoint.path}, which lacks "
            f"{', '.join(missing[:_SHOWN])} ({len(missing)} in all); take the whole model: transformers would draw "
            "them at random"
        )
    _allow_sampling(model)
    return model


def _allow_sampling(model: "PreTrainedModel") -> None:
    """Mend a generation_config.json that has a temperature without `do_sample`, as Llama-2-chat's and vicuna's.

    Transformers reads it with a warning, and refuses to write it: an export would fail after the training.
    """
    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


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


def add_lora(model: "PreTrainedModel", lora: LoraConfig, base: Checkpoint) -> "PeftModel":
    """Freeze a model, in 4 bits if they are asked for, and add low-rank adapters to it.

    `base` is the checkpoint that it was loaded from.

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
    if lora.quantization is not None:
        quantize(model, linear)
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
    # By default the name is that of the folder that transformers read, a local copy of the checkpoint.
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.path, base.revision
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


class TokenLogprobs(nn.Module):
    """A policy as the module that an engine trains: its output is the responses' log-probabilities, not logits."""

    def __init__(self, policy: "Backbone"):
        super().__init__()
        self.policy = policy

    def forward(self, batch: Responses, *, with_collisions: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return `response_token_logprobs`; on demand with `log_collisions` beside them, (batch, seq) each."""
        if not with_collisions:
            return response_token_logprobs(self.policy, batch)
        logprobs, collisions = _read_responses(self.policy, batch, _logprobs_and_collisions).unbind(-1)
        return on_responses(logprobs, batch.response_mask), on_responses(collisions, batch.response_mask)


def response_logprobs(model: "Backbone", batch: Responses) -> Float[Tensor, "batch"]:
    """Return log p(response | prompt) of each sequence, summed over the response's tokens, nats."""
    return response_token_logprobs(model, batch).sum(-1)


def response_token_logprobs(model: "Backbone", batch: Responses) -> Float[Tensor, "batch seq"]:
    """Return log pi(y_t | x, y_<t) of each response token, nats; 0 on padding."""
    return on_responses(_read_responses(model, batch, token_logprobs), batch.response_mask)


def _read_responses(model: "Backbone", batch: Responses, read: ReadLogits) -> Tensor:
    """Read the logits of all M response tokens, (M, *)."""
    token_ids = batch.response_ids[batch.response_mask]  # (M,)
    if has_known_head(causal_lm(model)):
        return read_head(causal_lm(model), hidden_states(model, batch)[batch.predicting], token_ids, read)
    return read(all_logits(model, batch)[batch.predicting], token_ids)


def _logprobs_and_collisions(logits: Tensor, token_ids: Tensor) -> Float[Tensor, "tokens 2"]:
    return torch.stack([token_logprobs(logits, token_ids), log_collisions(logits.detach())], -1)


def on_responses(values: Float[Tensor, "tokens"], response_mask: Tensor) -> Float[Tensor, "batch seq"]:
    """Put the values of all response tokens in the places of the mask; 0 elsewhere."""
    return values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)


def read_head(
    model: "PreTrainedModel", states: Float[Tensor, "tokens hidden"], token_ids: Int[Tensor, "tokens"], read: ReadLogits
) -> Tensor:
    """Read the logits that predict some tokens, with at most `LOGIT_BYTES` of logits at a time.

    More tokens than that are read in chunks, whose logits are computed again in the backward pass.

    Args:
        model: has the head.
        states: its last hidden states before the tokens.
        token_ids: the tokens.
        read: what is read, such as `token_logprobs`; one row for each token.
    """
    config = model.config.get_text_config()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[assignment]  # every causal language model has one
    compute_logits = head.forward
    chunk_size = max(1, LOGIT_BYTES // (4 * config.vocab_size))

    def read_chunk(states: Tensor, token_ids: Tensor) -> Tensor:
        return read(finished_logits(compute_logits(states), config), token_ids)

    def read_all(states: Tensor) -> Tensor:
        if len(states) <= chunk_size:
            return read_chunk(states, token_ids)
        chunks = zip(states.split(chunk_size), token_ids.split(chunk_size), strict=True)
        return torch.cat([checkpoint(read_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    # All chunks in one call of the head: under ZeRO-3 its weights are gathered by hooks around that call and around its
    # backward pass, once for all of them.
    with _forward_replaced(head, read_all):
        return head(states)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = vars(module).get("forward")  # something may have replaced it already
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


_KNOWN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_known_head(model: "PreTrainedModel") -> bool:
    """Return whether a model's logits are `finished_logits` of its head's output on its last hidden states.

    The model itself is asked, once, on a few tokens. Under ZeRO-3 all ranks take part.
    """
    if model not in _KNOWN_HEADS:
        seen: list[Tensor] = []
        body: nn.Module = model.get_decoder()
        head: nn.Module = model.get_output_embeddings()  # type: ignore[assignment]
        hooks = [
            body.register_forward_hook(lambda _module, _inputs, output: seen.append(output.last_hidden_state)),
            head.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output))),  # type: ignore[arg-type]
        ]
        with torch.no_grad():
            # Several tokens: one alone may be a padding token, whose embedding is zero, and so are its logits.
            logits = model(input_ids=torch.arange(8, device=model.device)[None], use_cache=False).logits
        for hook in hooks:
            hook.remove()
        is_known = False
        if len(seen) == 3:
            states, head_input, head_output = seen
            expected = finished_logits(head_output, model.config.get_text_config()).to(logits.dtype)
            is_known = torch.equal(states, head_input) and torch.equal(expected, logits)
        _KNOWN_HEADS[model] = is_known
        if not _KNOWN_HEADS[model]:
            logger.warning(
                "%s computes its logits in a way of its own: all logits of a micro-batch are in memory at once",
                type(model).__name__,
            )
    return _KNOWN_HEADS[model]


def finished_logits(logits: Float[Tensor, "tokens vocab"], config: "PreTrainedConfig") -> Float[Tensor, "tokens vocab"]:
    """Turn the head's output to logits, as the families do that scale or bound it."""
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    return logits
