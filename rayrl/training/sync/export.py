"""Export of a model in training to a folder that vLLM serves, with a probe of what the model must answer.

The probe is a fixed prompt with the trainer's own numbers for it. A replica that loads the folder compares its answer
with them before it serves.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayrl.data.collate import sequence_batch
from rayrl.engines.embedder import HEAD_FILE
from rayrl.engines.weight_folder import PROBE_FILE, PolicyProbe, Probe, ValueProbe
from rayrl.models.reward_model import RewardModel
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync.gather import Bucket, FullWeights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 300
"""Longer than any KV block: a replica that kept its prefix cache answers the probe wrongly."""
PROBE_CANDIDATES = 8
"""Likeliest next tokens whose log-probabilities are compared."""
PROBE_DIMENSIONS = 8
"""Coordinates of the pooled vectors that are compared."""
INDEX_FILE = "model.safetensors.index.json"


def export_policy(
    engine: zero.Engine,
    policy: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    url: str,
) -> None:
    """Write a policy, adapters merged, and its probe to `url`. Every rank takes part; rank 0 writes.

    Without a tokenizer the folder is for replicas that run already.
    """
    probe = policy_probe(engine, policy)
    export_folder(FullWeights(engine, policy), tokenizer, url, probe, head=None)


def export_reward_model(
    engine: zero.Engine, reward_model: RewardModel, tokenizer: "PreTrainedTokenizerBase", url: str
) -> None:
    """Write the backbone as a causal language model, the head beside it, and a probe of the head's value.

    Every rank takes part; rank 0 writes.
    """
    probe = value_probe(engine, reward_model)
    head = zero.gather(engine, dict(reward_model.head.named_parameters()))
    head = {name: weight.float() for name, weight in head.items()}
    export_folder(FullWeights(engine, reward_model.backbone), tokenizer, url, probe, head=head)


def policy_probe(engine: zero.Engine, policy: "PreTrainedModel | PeftModel") -> PolicyProbe:
    """Answer the probe with the policy. Every rank takes part."""
    prompt = probe_prompt(policy.config)
    engine.eval()
    with torch.no_grad():
        tokens = torch.tensor([prompt], device=engine.device)
        output = policy(input_ids=tokens, output_hidden_states=True, use_cache=False)
    engine.train()
    top = output.logits[0, -1].float().log_softmax(-1).topk(PROBE_CANDIDATES)
    hidden = output.hidden_states[-1][0].float()
    return {
        "prompt_token_ids": prompt,
        "token_ids": top.indices.tolist(),
        "logprobs": top.values.tolist(),
        # For the embedding replicas, which serve policies too, and pool in either way.
        "embedding": {
            "mean": hidden.mean(0)[:PROBE_DIMENSIONS].tolist(),
            "last": hidden[-1][:PROBE_DIMENSIONS].tolist(),
        },
    }


def value_probe(engine: zero.Engine, reward_model: RewardModel) -> ValueProbe:
    """Answer the probe with the reward model that the engine trains. Every rank takes part."""
    prompt = probe_prompt(reward_model.backbone.config)
    engine.eval()
    with torch.no_grad():
        value = engine(sequence_batch([prompt]).to(engine.device)).item()
    return {"prompt_token_ids": prompt, "value": value}


def probe_prompt(config: "PreTrainedConfig") -> list[int]:
    """Draw token ids over the whole vocabulary, the same for every run."""
    text_config = config.get_text_config()
    length = min(PROBE_TOKENS, text_config.max_position_embeddings - 2)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text_config.vocab_size, (length,), generator=generator).tolist()


def export_folder(
    weights: FullWeights,
    tokenizer: "PreTrainedTokenizerBase | None",
    url: str,
    probe: Probe,
    *,
    head: Bucket | None,
) -> None:
    """Write a model folder: configuration, weights, and what else it needs. Every rank takes part; rank 0 writes.

    Args:
        weights: of the causal language model.
        tokenizer: None leaves it out.
        url: the folder; one that is there is replaced.
        probe: the trainer's answer.
        head: weights of a scalar head, if there is one.
    """
    if launch.rank() != 0:
        for _ in weights.gather():  # rank 0 cannot gather alone
            pass
        return
    with storage.new_folder(url) as local:
        folder = Path(local)
        write_weights(weights, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(local)
        if storage.is_local(url):
            (folder / PROBE_FILE).write_text(json.dumps(probe))
        if head is not None:
            (folder / HEAD_FILE).parent.mkdir()
            save_file(head, folder / HEAD_FILE)
    if not storage.is_local(url):
        # A local folder is renamed into place whole. On an object store the files arrive one by one, and replicas that
        # wait for the folder wait for this one.
        storage.write_json(storage.join(url, PROBE_FILE), probe)


def write_weights(weights: FullWeights, folder: Path) -> None:
    """Write configuration and weights: one file, or one for each bucket and an index of them."""
    if len(weights) == 1:
        (bucket,) = weights.gather()
        weights.base.save_pretrained(folder, state_dict=bucket, safe_serialization=True)
        return
    file_of_weight: dict[str, str] = {}
    num_bytes = 0
    for number, bucket in enumerate(weights.gather(), 1):
        shard = f"model-{number:05}-of-{len(weights):05}.safetensors"
        num_bytes += sum(weight.nbytes for weight in bucket.values())
        # In a folder of its own: `save_pretrained` removes the weight files that it finds in its folder.
        with tempfile.TemporaryDirectory(dir=folder) as alone:
            weights.base.save_pretrained(alone, state_dict=bucket, safe_serialization=True)
            for file in Path(alone).iterdir():
                file.replace(folder / (shard if file.suffix == ".safetensors" else file.name))
        # Names are read back from the file: saving can rename weights.
        with safe_open(folder / shard, "pt") as written:
            file_of_weight |= dict.fromkeys(written.keys(), shard)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of_weight}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))
