"""From training state to a model folder that vLLM serves, with a probe of what it must answer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rayrl.models.reward import RewardModel
from rayrl.runs.storage import new_folder
from rayrl.training import engine as zero
from rayrl.training import launch

PROBE_TOKENS = 300
"""Longer than any KV block: a replica that kept its prefix cache answers the probe wrongly."""
PROBE_CANDIDATES = 8
PROBE_DIMENSIONS = 8


def export_policy(engine: Any, policy: Any, tokenizer: Any, url: str) -> None:
    """Write the policy (adapters merged) and its probe to `url`; every rank takes part, rank 0 writes.

    Without a tokenizer the folder is for replicas that run already.
    """
    prompt = probe_prompt(policy.config)
    engine.eval()
    with torch.no_grad():
        tokens = torch.tensor([prompt], device=engine.device)
        out = policy(input_ids=tokens, output_hidden_states=True, use_cache=False)
    engine.train()
    logprobs, hidden = out.logits[0, -1].float().log_softmax(-1), out.hidden_states[-1][0].float()
    top = logprobs.topk(PROBE_CANDIDATES)
    probe = {"prompt_token_ids": prompt, "token_ids": top.indices.tolist(), "logprobs": top.values.tolist()}
    pooled = {"mean": hidden.mean(0), "last": hidden[-1]}  # for the embedding replicas
    probe["embedding"] = {pooling: vector[:PROBE_DIMENSIONS].tolist() for pooling, vector in pooled.items()}
    _write(engine, policy, tokenizer, url, probe, head=None)


def export_reward_model(engine: Any, reward_model: RewardModel, tokenizer: Any, url: str) -> None:
    """Write the backbone as a causal model, the head beside it, and a probe of the head's value."""
    prompt = probe_prompt(reward_model.backbone.config)
    engine.eval()
    with torch.no_grad():
        tokens = torch.tensor([prompt], device=engine.device)
        positions = torch.arange(len(prompt), device=engine.device)[None]
        value = engine(tokens, torch.ones_like(tokens), positions).item()
    head = {name: weight.float() for name, weight in zero.gathered_state(engine, reward_model.head).items()}
    _write(engine, reward_model.backbone, tokenizer, url, {"prompt_token_ids": prompt, "value": value}, head=head)


def probe_prompt(config: Any) -> list[int]:
    """Token ids spread over the vocabulary, the same for every run."""
    context = config.get_text_config().max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, context - 2)
    return torch.randint(config.get_text_config().vocab_size, (length,), generator=generator).tolist()


def _write(
    engine: Any, model: Any, tokenizer: Any, url: str, probe: dict[str, Any], *, head: dict[str, Any] | None
) -> None:
    state = zero.gathered_state(engine, model)
    if launch.rank() != 0:
        return
    with new_folder(url) as folder:
        _save_pretrained(model, state, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (Path(folder) / "probe.json").write_text(json.dumps(probe))
        if head is not None:
            (Path(folder) / "head").mkdir()
            save_file(head, Path(folder) / "head" / "head.safetensors")


def _save_pretrained(model: Any, state: dict[str, torch.Tensor], folder: str) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        return
    base: Any = model.get_base_model()
    base.save_pretrained(folder, state_dict=merge_adapters(model, state), safe_serialization=True)


def merge_adapters(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + (alpha / rank) B A for every adapted layer, under the base model's own names."""
    prefix = "base_model.model."
    merged = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix(prefix).replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"]
            layer: nn.Module = model.get_submodule(stem)
            weight = (weight.float() + layer.scaling["default"] * b.float() @ a.float()).to(weight.dtype)  # type: ignore[index, operator]
        merged[plain] = weight
    return merged
