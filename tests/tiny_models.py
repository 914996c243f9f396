"""Random little models of the families that policies come from, for tests and benches where weights do not matter."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TOKENIZER = Path(__file__).parents[1] / "jobs" / "quickstart" / "model"
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 32,
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 2.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 128},
        },
    },
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "mistral": {"head_dim": 32, "sliding_window": 8},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": GEMMA | {"sliding_window": 8},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 1.0}},
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5}},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128, "dropout": 0.1},
    "mixtral": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **{"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    },
}
"""Settings of each family beside the sizes that all have, by transformers' name."""


def make_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0) -> Path:
    """Write a 2-layer random model (head size 32, context 256) and a tokenizer into `folder`; returns `folder`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # 64 / 2: vLLM's CPU attention takes no head smaller than 32
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family not in ("gpt_neox", "mixtral", "qwen3_moe", "phi3"),
        "initializer_range": 0.1,  # wide enough that greedy text is not one token for ever
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    if family == "gpt2":
        renamed = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": 128}
        common = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")
        sizes = renamed | {name: sizes[name] for name in common}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return Path(folder)
