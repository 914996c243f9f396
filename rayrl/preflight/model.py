"""Facts of a model folder, from its JSON files and the headers of its weights. No weights are read."""

import os
import re
from dataclasses import dataclass
from typing import Any

from rayrl.config import PolicyConfig
from rayrl.data.light_tokenizer import LightTokenizer, load_light_tokenizer
from rayrl.errors import ConfigError
from rayrl.preflight.memory import ModelShape
from rayrl.preflight.weights import check_complete, read_json_file, read_weights
from rayrl.runs import storage

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes that vLLM 0.32.0's CPU attention has (`CPUAttentionBackend.get_supported_head_sizes`)."""

CPU_MISREAD_FAMILIES = {"gpt_neox": "GPT-NeoX"}
"""Families of which vLLM 0.32.0 computes other log-probabilities on CPUs than the trainer (jobs/bench/RESULTS.md)."""

_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForImageTextToText)$")
"""Names of architectures that write text."""
_ENCODERS = frozenset(
    (
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "albert",
        "electra",
        "deberta",
        "deberta-v2",
        "mpnet",
        "modernbert",
    )
)
"""Families that write no text, for a config.json that names no architecture."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
"""Files of which a tokenizer has at least one."""
_MAX_REASON = 200
"""Characters of a library's own message."""
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{path}').merge_and_unload().save_pretrained('merged')\""
)
"""Command that makes a model of an adapter and its base."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of the policy that the checks need; None is unknown."""

    weights_bytes: int | None = None
    num_parameters: int | None = None
    max_model_len: int | None = None
    tokenizer: LightTokenizer | None = None
    shape: ModelShape | None = None
    linear_names: list[str] | None = None
    """Names of the linear layers, as they are called in every layer."""
    num_heads: int | None = None
    num_layers: int | None = None


def inspect_model(policy: PolicyConfig, *, has_gpu: bool, online: bool) -> ModelFacts:
    """Refuse a policy that cannot run, and return its facts.

    Nothing is known of a model on the hub that is not in the cache yet, unless `online`.

    Raises:
        ConfigError: no model folder, no safetensors, a family, head_dim or context the engine cannot have.
    """
    folder = model_folder(policy.path, policy.revision, online=online, setting="policy.path")
    if folder is None:
        return ModelFacts(max_model_len=policy.max_model_len)
    config = read_json_file(storage.join(folder, "config.json"))
    if not policy.trust_remote_code:  # whose classes may have any name
        _check_kind(config, policy.path)
    config |= config.get("text_config") or {}  # a multimodal model nests its language model
    if not has_gpu:
        _check_family(config, policy.path)
        _check_head_dim(config, policy.path)
    generation = storage.join(folder, "generation_config.json")
    if storage.exists(generation):
        read_json_file(generation)  # or else it would be found broken when the trained model is written
    weights = read_weights(folder, policy.path, may_come=folder != policy.path)
    if weights is not None:
        check_complete(weights, config, policy.path)
    elif _is_offline():
        raise ConfigError(
            f"policy.path must be a model whose weights are here, got {policy.path}, of which the hub's cache has a "
            "part only, and HF_HUB_OFFLINE=1 forbids to ask the hub; download it once: HF_HUB_OFFLINE=0 hf download "
            f"{policy.path}"
        )
    num_parameters = None if weights is None else weights.num_parameters
    return ModelFacts(
        weights_bytes=None if weights is None else weights.num_bytes,
        num_parameters=num_parameters,
        max_model_len=_max_model_len(policy, config),
        tokenizer=_tokenizer(folder, policy.path),
        shape=model_shape(config, num_parameters),
        linear_names=None if weights is None else weights.linear_names or None,
        num_heads=config.get("num_attention_heads") or config.get("n_head"),
        num_layers=config.get("num_hidden_layers") or config.get("n_layer"),
    )


def model_folder(path: str, revision: str | None, *, online: bool, setting: str) -> str | None:
    """Find the folder of a model: for a hub id its cached snapshot, or None where there is none yet.

    Raises:
        ConfigError: neither a model folder nor, as far as can be told, a hub id.
    """
    remedy = "give the folder that save_pretrained wrote, or a hub id"
    if "://" in path or os.path.isdir(path):
        if storage.exists(storage.join(path, "config.json")):
            return path
        if storage.exists(storage.join(path, "adapter_config.json")):
            raise ConfigError(_adapter(path, setting))
        raise ConfigError(f"{setting} must be a model folder with a config.json, got {path}; {remedy}")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path):
        what = "that is a file" if os.path.isfile(path) else "there is no such folder"
        raise ConfigError(f"{setting} must be a model folder or a hub id, got {path}: {what}; {remedy}")
    from huggingface_hub import constants, snapshot_download

    is_offline = not online or constants.HF_HUB_OFFLINE
    small_files = ["*.json", "*.jinja"]
    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=small_files, local_files_only=is_offline)
    except (OSError, ValueError) as error:
        # A plan asks the cache only, and a run may still download the model. Without a hub it never will.
        if not is_offline or constants.HF_HUB_OFFLINE:
            raise ConfigError(_not_to_be_had(path, setting, error)) from None
        return None
    return folder if storage.exists(storage.join(folder, "config.json")) else None


def model_shape(config: dict[str, Any], num_parameters: int | None) -> ModelShape | None:
    """Read the sizes of a language model from its config.json; None if it lacks one of them.

    Args:
        config: of the language model.
        num_parameters: of the weights; None counts them from the sizes.
    """

    def first(*names: str) -> int | None:
        # Older architectures have names of their own for these settings.
        return next((config[name] for name in names if config.get(name)), None)

    hidden, layers = first("hidden_size", "n_embd"), first("num_hidden_layers", "n_layer")
    heads, vocab = first("num_attention_heads", "n_head"), first("vocab_size")
    if hidden is None or layers is None or heads is None or vocab is None:
        return None
    head_dim = first("head_dim") or hidden // heads
    kv_size = (first("num_key_value_heads") or heads) * head_dim
    # A mixture of experts keeps the activations of the experts that a token passes.
    dense = first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    experts = (first("num_experts_per_tok") or 0) * (first("moe_intermediate_size") or dense)
    intermediate = experts or dense
    if num_parameters is None:
        layer = hidden * (2 * heads * head_dim + 2 * kv_size + 3 * dense)
        num_matrices = 1 if config.get("tie_word_embeddings") else 2
        num_parameters = layers * layer + num_matrices * vocab * hidden
    return ModelShape(
        num_parameters=num_parameters,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        attention_size=heads * head_dim,
        kv_size=kv_size,
        vocab_size=vocab,
    )


def _check_family(config: dict[str, Any], path: str) -> None:
    """Refuse a model of which vLLM computes other log-probabilities without a GPU."""
    family = CPU_MISREAD_FAMILIES.get(config.get("model_type") or "")
    if family is not None:
        raise ConfigError(
            f"policy.path: without a GPU the model must not be a {family} model, of which vLLM on CPUs computes other "
            f"log-probabilities than the trainer, got {path}; take a model of another family, or a machine with a GPU"
        )


def _check_head_dim(config: dict[str, Any], path: str) -> None:
    """Refuse a model whose attention vLLM cannot compute without a GPU."""
    # Older architectures have names of their own for these settings.
    hidden = config.get("hidden_size") or config.get("n_embd")
    heads = config.get("num_attention_heads") or config.get("n_head")
    head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if head_dim is not None and head_dim not in CPU_HEAD_DIMS:
        allowed = ", ".join(map(str, CPU_HEAD_DIMS))
        raise ConfigError(
            f"policy.path: without a GPU the model's head_dim must be one of {allowed} "
            f"(vLLM's CPU attention), got {head_dim} in {path}; take another model, or a machine with a GPU"
        )


def _is_offline() -> bool:
    """Return whether the hub may not be asked."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _not_to_be_had(path: str, setting: str, error: Exception) -> str:
    """Say why a name is neither a folder nor a model of the hub; the library's own remedies are no settings."""
    here = f"there is no such folder in {os.getcwd()}"
    if _is_offline():
        return (
            f"{setting} must be a model folder or a hub id whose files are here, got {path}: {here}, the hub's cache "
            "has no such model, and HF_HUB_OFFLINE=1 forbids to ask the hub; correct the path, or download it once: "
            f"HF_HUB_OFFLINE=0 hf download {path}"
        )
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{setting} must be a model folder or a hub id, got {path}: {here}, and the hub does not give it ({reason}); "
        "correct it, or for a gated model accept its licence and set HF_TOKEN"
    )


def _adapter(path: str, setting: str) -> str:
    """Say how a model is made of an adapter."""
    settings = read_json_file(storage.join(path, "adapter_config.json"))
    base = settings.get("base_model_name_or_path") or "its base model"
    return (
        f"{setting} must be a whole model, got {path}, which is an adapter for {base}; merge them first: "
        f"{_MERGE.format(path=path)}; copy the tokenizer's files into the folder merged, and give that"
    )


def _check_kind(config: dict[str, Any], path: str) -> None:
    """Refuse a model that writes no text from left to right, or whose weights cannot be trained."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
        raise ConfigError(
            f"policy.path must have weights that can be trained, in float32, bfloat16 or float16, got {path}, whose "
            f"are quantised ({method}); take the model that it was made from"
        )
    names = config.get("architectures") or []
    writes = any(_GENERATES.search(name) for name in names) if names else config.get("model_type") not in _ENCODERS
    if not writes or config.get("is_encoder_decoder"):
        kind = ", ".join(names) or config.get("model_type")
        raise ConfigError(
            f"policy.path must be a causal language model, which writes a text from left to right, got {path}, which "
            f"is {kind}; take one, such as a LlamaForCausalLM"
        )


def _tokenizer(folder: str, path: str) -> LightTokenizer | None:
    """Load the tokenizer; None where a part of a hub model has none yet, or it is of a form that plans do not read.

    Raises:
        ConfigError: the folder has none, or it cannot be read.
    """
    if folder == path and not any(storage.exists(storage.join(folder, name)) for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"policy.path must hold the model's tokenizer, got {path}, in which there is no {_TOKENIZER_FILES[0]}; "
            "copy it from the model that this one was trained from (tokenizer.json, tokenizer_config.json)"
        )
    try:
        return load_light_tokenizer(folder)
    except ConfigError:
        raise
    except Exception as error:  # the library's own are of no particular class
        raise ConfigError(
            f"policy.path must hold a tokenizer that can be read, got {path}: {str(error).strip()[:_MAX_REASON]}; "
            "download it again (git lfs pull, if it is a pointer)"
        ) from None


def _max_model_len(policy: PolicyConfig, config: dict[str, Any]) -> int | None:
    """The context that the engines will have; refuses one that is longer than the model's own."""
    context = config.get("max_position_embeddings") or config.get("n_positions")
    scaled = config.get("rope_scaling") or (config.get("rope_parameters") or {}).get("factor")
    # A rope that is scaled may reach further than max_position_embeddings says.
    if policy.max_model_len and context and not scaled and policy.max_model_len > context:
        raise ConfigError(
            f"policy.max_model_len must be at most the model's context {context}, got {policy.max_model_len}; lower "
            "it, or leave it out"
        )
    return policy.max_model_len or context
