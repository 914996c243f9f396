"""Random little models of two families, with the quickstart's tokenizer, for tests where weights do not matter."""

import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TOKENIZER = Path(__file__).parents[1] / "jobs" / "quickstart" / "model"


def make_tiny_model(folder: Path, family: Literal["llama", "qwen2"] = "llama", *, seed: int = 0) -> Path:
    """Write a 2-layer random model (head size 32, context 256) and a tokenizer into `folder`; returns `folder`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # 64 / 2: vLLM's CPU attention takes no head smaller than 32
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # wide enough that greedy text is not one token for ever
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    torch.manual_seed(seed)
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(head_dim=32, **sizes))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return Path(folder)
