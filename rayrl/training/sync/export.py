"""Export of a model in training to a folder that vLLM serves, with a record of the weights.

The record holds the sums of the weights in the trainer's memory, with which a replica that loads the folder compares
what it then serves, and the trainer's reading of a text. The difference to the replica's reading is reported.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayrl.algorithms.preference import token_logprobs
from rayrl.config import PolicyConfig
from rayrl.data.collate import sequence_batch
from rayrl.data.tokenizing import load_tokenizer
from rayrl.engines.embedder import HEAD_FILE
from rayrl.engines.weight_folder import RECORD_FILE, TextReading, WeightRecord
from rayrl.engines.weight_sums import INDEX_FILE, Sums, TensorSums, grouped, named_sums
from rayrl.models.bottleneck import BottleneckHead, linear_head
from rayrl.models.reward_model import RewardModel
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync.gather import Bucket, FullWeights
from rayrl.training.sync.model_folder import complete_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FOLDER = "adapter"
"""Below the model folder's own files: vLLM loads every safetensors file at the top of it."""
MAX_TEXT_TOKENS = 256
"""Of the text that trainer and replicas read."""
TEXT = (
    "The river rises in the hills north of the town, where three small streams meet below an old stone bridge. In "
    "spring the snow melts quickly, and for a few weeks the water covers the lower meadows, so that the farmers "
    "move their sheep to the slopes until it has gone down. The first mill was built here more than four hundred "
    "years ago. It ground wheat and rye for the villages around it, and later it sawed timber for the ships that "
    "were built at the coast. When the railway came, most of that trade was lost, and the mill stood empty until a "
    "teacher and her brother bought it and turned it into a school. Today about sixty children learn there. They "
    "read in the morning, when their minds are fresh, and in the afternoon they work in the garden or in the "
    "workshop. Every child keeps a notebook of the weather: how warm it is, which way the wind blows, and how high "
    "the river stands. From these notes they have found out that the water now rises eleven days earlier than it "
    "did when their grandparents were young."
)
"""Plain English of more than 100 tokens in any tokenizer."""


def export_policy(
    engine: zero.Engine,
    policy: "PreTrainedModel | PeftModel",
    source: PolicyConfig | None,
    url: str,
) -> None:
    """Write a policy, adapters merged, and its record to `url`. Every rank takes part; rank 0 writes.

    The tokenizer is that of `source`, the run's policy. Without it the folder is for replicas that run already: its
    record holds no reading of a text, and adapters are not written beside the merged weights.
    """
    text = None if source is None else read_policy_text(engine, policy, load_tokenizer(source))
    export_folder(FullWeights(engine, policy), source, url, text, head=None)


def export_reward_model(engine: zero.Engine, reward_model: RewardModel, source: PolicyConfig, url: str) -> None:
    """Write the backbone as a causal language model, the linear head beside it, and the record of the backbone.

    Every rank takes part; rank 0 writes.
    """
    text = read_value_text(engine, reward_model, load_tokenizer(source))
    head = zero.gather(engine, dict(reward_model.head.named_parameters()))
    if head and isinstance(reward_model.head, BottleneckHead):
        head = linear_head(head)
    head = {name: weight.float() for name, weight in head.items()}
    export_folder(FullWeights(engine, reward_model.backbone), source, url, text, head=head)


def read_policy_text(
    engine: zero.Engine, policy: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase"
) -> TextReading:
    """Read the text with the policy. Every rank takes part."""
    token_ids = text_tokens(policy, tokenizer)
    tokens = torch.tensor([token_ids], device=engine.device)
    engine.eval()
    with torch.no_grad():
        logits = policy(input_ids=tokens, use_cache=False).logits[:, :-1]
        logprobs = token_logprobs(logits, tokens[:, 1:])
    engine.train()
    return {"token_ids": token_ids, "logprobs": logprobs[0].tolist()}


def read_value_text(
    engine: zero.Engine, reward_model: RewardModel, tokenizer: "PreTrainedTokenizerBase"
) -> TextReading:
    """Read the text with the reward model that the engine trains. Every rank takes part."""
    token_ids = text_tokens(reward_model.backbone, tokenizer)
    engine.eval()
    with torch.no_grad():
        value = engine(sequence_batch([token_ids]).to(engine.device)).item()
    engine.train()
    return {"token_ids": token_ids, "value": value}


def text_tokens(model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the first tokens of the text, within the model's context."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return tokenizer(TEXT)["input_ids"][: min(MAX_TEXT_TOKENS, context or MAX_TEXT_TOKENS)]


def export_folder(
    weights: FullWeights,
    source: PolicyConfig | None,
    url: str,
    text: TextReading | None,
    *,
    head: Bucket | None,
) -> None:
    """Write a model folder: configuration, weights, and what else it needs. Every rank takes part; rank 0 writes.

    Args:
        weights: of the causal language model.
        source: has the tokenizer; None leaves out it and the folder of the adapters.
        url: the folder; one that is there is replaced.
        text: the trainer's reading of a text, if replicas shall report how far they are from it.
        head: weights of a scalar head, if there is one.
    """
    adapter = {} if source is None or weights.adapted is None else weights.gather_adapter()
    if launch.rank() != 0:
        for _ in weights.gather():  # rank 0 cannot gather alone
            pass
        return
    with storage.new_folder(url) as local:
        folder = Path(local)
        sums = write_weights(weights, folder)
        if source is not None:
            complete_folder(folder, source)
        if adapter and weights.adapted is not None:
            write_adapter(weights.adapted, adapter, folder / ADAPTER_FOLDER)
        record = WeightRecord(dtype=str(weights.base.dtype).removeprefix("torch."), sums=sums, text=text)
        if storage.is_local(url):
            (folder / RECORD_FILE).write_text(json.dumps(record))
        if head is not None:
            (folder / HEAD_FILE).parent.mkdir()
            save_file(head, folder / HEAD_FILE)
    if not storage.is_local(url):
        # A local folder is renamed into place whole. On an object store the files arrive one by one, and replicas that
        # wait for the folder wait for this one.
        storage.write_json(storage.join(url, RECORD_FILE), record)


def write_adapter(model: "PeftModel", weights: Bucket, folder: Path) -> None:
    """Write adapters in a folder that `PeftModel.from_pretrained` loads onto the checkpoint that they were trained on.

    Args:
        model: has the adapters, and their settings.
        weights: of the adapters, whole, under their names in memory.
        folder: a new one.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    folder.mkdir()
    # Otherwise peft asks the hub whether the vocabulary has grown; embeddings are never trained beside adapters.
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.inference_mode = True
    # In order: peft keeps the names as a set, and the file would differ from run to run.
    config.target_modules = sorted(config.target_modules or [])
    config.save_pretrained(str(folder))


def write_weights(weights: FullWeights, folder: Path) -> Sums:
    """Write configuration and weights: one file, or one for each bucket and an index of them. Return their sums."""
    if len(weights) == 1:
        (bucket,) = weights.gather()
        weights.base.save_pretrained(folder, state_dict=bucket, safe_serialization=True)
        return grouped(named_sums(bucket))
    sums: list[tuple[str, TensorSums]] = []
    file_of_weight: dict[str, str] = {}
    num_bytes = 0
    for number, bucket in enumerate(weights.gather(), 1):
        shard = f"model-{number:05}-of-{len(weights):05}.safetensors"
        num_bytes += sum(weight.nbytes for weight in bucket.values())
        sums += named_sums(bucket)
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
    return grouped(sums)
