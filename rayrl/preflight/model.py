"""Facts of a model folder, from its config.json and file names. No weights are read."""

import os
from dataclasses import dataclass
from typing import Any

from rayrl.config import PolicyConfig
from rayrl.data.light_tokenizer import LightTokenizer, load_light_tokenizer
from rayrl.errors import ConfigError
from rayrl.preflight.memory import ModelShape
from rayrl.runs import storage

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes that vLLM 0.32.0's CPU attention has (`CPUAttentionBackend.get_supported_head_sizes`)."""

CPU_MISREAD_FAMILIES = {"gpt_neox": "GPT-NeoX"}
"""Families of which vLLM 0.32.0 computes other log-probabilities on CPUs than the trainer (jobs/bench/RESULTS.md)."""

_BYTES_PER_PARAMETER = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of the policy that the checks need; None is unknown."""

    weights_bytes: int | None = None
    num_parameters: int | None = None
    max_model_len: int | None = None
    tokenizer: LightTokenizer | None = None
    shape: ModelShape | None = None


def inspect_model(policy: PolicyConfig, *, has_gpu: bool, online: bool) -> ModelFacts:
    """Refuse a policy that cannot run, and return its facts.

    Nothing is known of a model on the hub that is not in the cache yet, unless `online`.

    Raises:
        ConfigError: no model folder, no safetensors, a family, head_dim or context the engine cannot have.
    """
    folder = model_folder(policy.path, policy.revision, online=online, setting="policy.path")
    if folder is None:
        return ModelFacts(max_model_len=policy.max_model_len)
    config = storage.read_json(storage.join(folder, "config.json"))
    config |= config.get("text_config") or {}  # a multimodal model nests its language model
    if not has_gpu:
        _check_family(config, policy.path)
        _check_head_dim(config, policy.path)
    weights_bytes = _weights_bytes(folder, policy.path)
    width = _BYTES_PER_PARAMETER.get(config.get("dtype") or config.get("torch_dtype"), 4)
    return ModelFacts(
        weights_bytes=weights_bytes,
        num_parameters=None if weights_bytes is None else weights_bytes // width,
        max_model_len=_max_model_len(policy, config),
        tokenizer=load_light_tokenizer(folder),
        shape=model_shape(config, None if weights_bytes is None else weights_bytes // width),
    )


def model_folder(path: str, revision: str | None, *, online: bool, setting: str) -> str | None:
    """Find the folder of a model: for a hub id its cached snapshot, or None where there is none yet.

    Raises:
        ConfigError: neither a model folder nor, as far as can be told, a hub id.
    """
    remedy = "give the folder that save_pretrained wrote, or a hub id"
    if "://" in path or os.path.isdir(path):
        if not storage.exists(storage.join(path, "config.json")):
            raise ConfigError(f"{setting} must be a model folder with a config.json, got {path}; {remedy}")
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path):
        raise ConfigError(
            f"{setting} must be a model folder or a hub id, got {path}: there is no such folder; {remedy}"
        )
    from huggingface_hub import constants, snapshot_download

    is_offline = not online or constants.HF_HUB_OFFLINE
    small_files = ["*.json", "*.jinja"]
    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=small_files, local_files_only=is_offline)
    except (OSError, ValueError) as error:
        # A plan asks the cache only, and a run may still download the model. Without a hub it never will.
        if not is_offline or constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{setting} must be a model folder or a hub id, got {path}: no such folder, and not to be "
                f"had from the hub ({error}); download the model and give its folder"
            ) from None
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


def _weights_bytes(folder: str, path: str) -> int | None:
    """Sum the sizes of a folder's safetensors; None for a cached snapshot without weights."""
    fs, root = storage.locate(folder)
    sizes = {file["name"]: file["size"] for file in fs.ls(root, detail=True)}
    weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
    if weights:
        return sum(weights)
    has_pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in sizes)
    if has_pickles or folder == path:
        raise ConfigError(
            f"policy.path must hold weights as *.safetensors, got {path}, which has none; convert them with "
            "save_pretrained (pickled weights can run code, and are never loaded)"
        )
    return None  # a snapshot of the small files only, which another command has cached


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
