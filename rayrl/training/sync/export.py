"""From training state to a model folder that vLLM serves, with a probe of what it must answer."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayrl.engines.weight_folder import PROBE_FILE
from rayrl.models.reward import RewardModel
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync.gather import Weights

PROBE_TOKENS = 300
"""Longer than any KV block: a replica that kept its prefix cache answers the probe wrongly."""
PROBE_CANDIDATES = 8
PROBE_DIMENSIONS = 8


def export_policy(engine: Any, policy: Any, tokenizer: Any, url: str) -> None:
    """Write the policy (adapters merged) and its probe to `url`; every rank takes part, rank 0 writes.

    Without a tokenizer the folder is for replicas that run already.
    """
    write(Weights(engine, policy), tokenizer, url, policy_probe(engine, policy), head=None)


def policy_probe(engine: Any, policy: Any) -> dict[str, Any]:
    """A fixed prompt, and what whoever serves the policy must answer. Every rank takes part."""
    prompt = probe_prompt(policy.config)
    engine.eval()
    with torch.no_grad():
        tokens = torch.tensor([prompt], device=engine.device)
        out = policy(input_ids=tokens, output_hidden_states=True, use_cache=False)
    engine.train()
    logprobs, hidden = out.logits[0, -1].float().log_softmax(-1), out.hidden_states[-1][0].float()
    top = logprobs.topk(PROBE_CANDIDATES)
    pooled = {"mean": hidden.mean(0), "last": hidden[-1]}  # for the embedding replicas
    return {
        "prompt_token_ids": prompt,
        "token_ids": top.indices.tolist(),
        "logprobs": top.values.tolist(),
        "embedding": {pooling: vector[:PROBE_DIMENSIONS].tolist() for pooling, vector in pooled.items()},
    }


def export_reward_model(engine: Any, reward_model: RewardModel, tokenizer: Any, url: str) -> None:
    """Write the backbone as a causal model, the head beside it, and a probe of the head's value."""
    prompt = probe_prompt(reward_model.backbone.config)
    engine.eval()
    with torch.no_grad():
        tokens = torch.tensor([prompt], device=engine.device)
        positions = torch.arange(len(prompt), device=engine.device)[None]
        value = engine(tokens, torch.ones_like(tokens), positions).item()
    head = zero.gathered(engine, dict(reward_model.head.named_parameters()))
    head = {name: weight.float() for name, weight in head.items()}
    weights = Weights(engine, reward_model.backbone)
    write(weights, tokenizer, url, {"prompt_token_ids": prompt, "value": value}, head=head)


def probe_prompt(config: Any) -> list[int]:
    """Token ids spread over the vocabulary, the same for every run."""
    context = config.get_text_config().max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, context - 2)
    return torch.randint(config.get_text_config().vocab_size, (length,), generator=generator).tolist()


def write(weights: Weights, tokenizer: Any, url: str, probe: dict[str, Any], *, head: dict[str, Any] | None) -> None:
    """Write the model folder and its probe, on rank 0; every rank takes part."""
    if launch.rank() != 0:
        for _ in weights.gathered():
            pass
        return
    with storage.new_folder(url) as folder:
        save_weights(weights, Path(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if storage.is_local(url):
            (Path(folder) / PROBE_FILE).write_text(json.dumps(probe))
        if head is not None:
            (Path(folder) / "head").mkdir()
            save_file(head, Path(folder) / "head" / "head.safetensors")
    if not storage.is_local(url):  # files arrive one by one; who waits for the folder waits for this one
        storage.write_json(storage.join(url, PROBE_FILE), probe)


def save_weights(weights: Weights, folder: Path) -> None:
    """Write configuration and weights: one file, or one for each bucket and an index of them."""
    if len(weights) == 1:
        (state,) = weights.gathered()
        weights.base.save_pretrained(folder, state_dict=state, safe_serialization=True)
        return
    places: dict[str, str] = {}
    num_bytes = 0
    for number, state in enumerate(weights.gathered(), 1):
        shard = f"model-{number:05}-of-{len(weights):05}.safetensors"
        num_bytes += sum(weight.nbytes for weight in state.values())
        with tempfile.TemporaryDirectory(dir=folder) as alone:  # it would remove the shards that are there
            weights.base.save_pretrained(alone, state_dict=state, safe_serialization=True)
            for file in Path(alone).iterdir():
                file.replace(folder / (shard if file.suffix == ".safetensors" else file.name))
        with safe_open(folder / shard, "pt") as written:
            places |= dict.fromkeys(written.keys(), shard)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
