"""An export holds the weights that were trained, in one file or in many."""

import asyncio
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rayrl.config import LoraConfig, PolicyConfig, TrainingConfig
from rayrl.data.tokenizing import load_tokenizer
from rayrl.engines.weight_folder import RECORD_FILE, folder_sums, read_record, wait_for_folder
from rayrl.engines.weight_sums import difference
from rayrl.models.policy import add_lora, load_policy
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.launch import fit
from rayrl.training.sync.export import MAX_TEXT_TOKENS, TEXT, export_folder, text_tokens, write_weights
from rayrl.training.sync.gather import FullWeights, merge_adapters, split_into_buckets
from tests.training.test_fit import stream_of, write_examples

LORA = LoraConfig(rank=4, alpha=6)
BASE = Checkpoint(path="an-org/a-model", revision="v2", version="base")
SMALL = 200_000
"""Bytes: the tiny policy's embedding is larger, its layers are smaller."""
WHOLE = SimpleNamespace(
    zero_optimization_stage=lambda: 0, device=torch.device("cpu"), eval=lambda: None, train=lambda: None
)
"""As much of an engine as an export touches, where nothing is sharded."""


def adapted(model):
    """With adapters that do something, the same in every process."""
    torch.manual_seed(0)
    model = add_lora(model, LORA, BASE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def merged_by_peft(policy):
    return dict(adapted(policy.load()).merge_and_unload().named_parameters())


def test_merge_adapters_is_pefts(tiny_policy):
    model = adapted(tiny_policy.load())
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = merge_adapters(model, state)
    expected = merged_by_peft(tiny_policy)
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name].detach(), atol=1e-5, rtol=1e-5)
    plain = tiny_policy.load().state_dict()
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.weight"]
    )


def test_the_text_is_long_in_any_tokenizer_and_within_the_context(tiny_policy):
    model, tokenizer = tiny_policy.load(), load_tokenizer(PolicyConfig(path=tiny_policy.path))
    assert len(TEXT.split()) > 150, "a tokenizer makes at least one token of a word"
    assert len(text_tokens(model, tokenizer)) == MAX_TEXT_TOKENS
    model.config.max_position_embeddings = 64
    assert len(text_tokens(model, tokenizer)) == 64


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, []),
        ({"a": 4, "b": 6, "c": 1}, [["a", "b"], ["c"]]),
        ({"a": 11, "b": 1, "c": 10}, [["a"], ["b"], ["c"]]),  # a layer is never cut
        ({"a": 1, "b": 25, "c": 1, "d": 9}, [["a"], ["b"], ["c", "d"]]),
    ],
)
def test_buckets_hold_all_names_in_order_and_no_more_than_they_may(sizes, expected):
    assert split_into_buckets(sizes, 10) == expected


def test_a_layer_and_its_adapters_lie_in_one_bucket():
    q, k = ([f"m.{of}.{part}.weight" for part in ("base_layer", "lora_A.default", "lora_B.default")] for of in "qk")
    assert split_into_buckets(dict.fromkeys(["m.norm.weight", *q, *k], 2), 7) == [["m.norm.weight"], q, k]
    assert split_into_buckets(dict.fromkeys([*q, *k], 2), 12) == [[*q, *k]]


def test_a_small_model_is_one_file_as_transformers_writes_it(tiny_policy, tmp_path):
    model = tiny_policy.load()
    write_weights(FullWeights(WHOLE, model), tmp_path / "ours")
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "theirs", state_dict=state)
    assert [file.name for file in (tmp_path / "ours").glob("*.safetensors*")] == ["model.safetensors"]
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_bucket_is_held_at_a_time_and_known_before_it_is_gathered(tiny_policy):
    weights = FullWeights(WHOLE, adapted(tiny_policy.load()), max_bytes=SMALL)
    promised = list(weights.describe())
    assert len(promised) == len(weights) > 3
    last, seen = [], []
    for state in weights.gather():
        assert all(reference() is None for reference in last), "the last bucket is still there"
        last = [weakref.ref(weight) for weight in state.values()]
        seen.append({name: (weight.shape, weight.dtype) for name, weight in state.items()})
        del state
    assert seen == [{name: (weight.shape, weight.dtype) for name, weight in state.items()} for state in promised]
    names = [name for state in seen for name in state]
    assert sorted(names) == sorted(merged_by_peft(tiny_policy))


def assert_adapter_is_the_trained_one(tiny_policy, folder):
    """peft loads the adapter onto the base model, which then has the log-probabilities of the adapted model."""
    adapter = folder / "adapter"
    assert {file.name for file in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE.path, BASE.revision)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (LORA.rank, LORA.alpha, True)
    assert config["target_modules"] == sorted(config["target_modules"])
    tokens = torch.tensor([text_tokens(tiny_policy.load(), load_tokenizer(PolicyConfig(path=tiny_policy.path)))])
    loaded = PeftModel.from_pretrained(tiny_policy.load(), adapter).eval()
    trained, plain = adapted(tiny_policy.load()).eval(), tiny_policy.load()
    with torch.no_grad():
        ours, theirs, before = (model(tokens).logits.log_softmax(-1) for model in (trained, loaded, plain))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_adapters_are_written_beside_the_merged_weights(tiny_policy, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "rank", lambda: 0)
    model, policy = adapted(tiny_policy.load()), PolicyConfig(path=tiny_policy.path)
    export_folder(FullWeights(WHOLE, model), policy, f"{tmp_path}/model", None, head=None)
    assert_adapter_is_the_trained_one(tiny_policy, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert model.peft_config["default"].inference_mode is False, "the model in training stays as it was"
    export_folder(FullWeights(WHOLE, model), None, f"{tmp_path}/for replicas", None, head=None)
    export_folder(FullWeights(WHOLE, tiny_policy.load()), policy, f"{tmp_path}/plain", None, head=None)
    assert not (tmp_path / "for replicas" / "adapter").exists()
    assert not (tmp_path / "plain" / "adapter").exists()


def export_in_shards(job, rows):
    """A worker's loop: no training, only a policy in shards and its export."""
    training = TrainingConfig(num_workers=2, zero_stage=3)
    with zero.sharded_loading(training, torch.float32):
        policy = adapted(load_policy(Checkpoint(path=job["path"], version="tiny"), torch.float32))
        engine = zero.start(policy, training, torch.float32, 1)
    weights = FullWeights(engine, engine.module, max_bytes=SMALL)
    export_folder(weights, PolicyConfig(path=job["path"]), job["url"], None, head=None)


def shards(folder):
    return {file.name: load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))}


def test_a_policy_sharded_over_two_workers_is_written_and_served_in_shards(generators, tiny_policy, tmp_path):
    training = TrainingConfig(num_workers=2, zero_stage=3)
    job = {"path": tiny_policy.path, "url": f"{tmp_path}/model"}
    stream = stream_of(write_examples(tmp_path / "rows"), 0)
    fit(export_in_shards, job, training, stream, storage=f"{tmp_path}/fit", on_gpu=False)
    written = shards(tmp_path / "model")
    assert list(written) == [f"model-{n:05}-of-{len(written):05}.safetensors" for n in range(1, len(written) + 1)]
    assert len(written) > 3
    expected = merged_by_peft(tiny_policy)
    for state in written.values():
        assert len(state) == 1 or sum(weight.nbytes for weight in state.values()) <= SMALL
        for name, weight in state.items():
            torch.testing.assert_close(weight, expected.pop(name).detach(), atol=1e-5, rtol=1e-5)
    assert not expected, "every weight is in one shard"
    record = read_record(tmp_path / "model")
    assert record["dtype"] == "float32"
    assert difference(folder_sums(tmp_path / "model", "float32"), record["sums"]) is None
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, state in written.items() for name in state}
    assert index["metadata"]["total_size"] == sum(w.nbytes for state in written.values() for w in state.values())
    model = load_policy(Checkpoint(path=job["url"], version="in shards"), torch.float32)  # reads the index
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(model.get_parameter(q_proj).detach(), merged_by_peft(tiny_policy)[q_proj].detach())
    assert_adapter_is_the_trained_one(tiny_policy, tmp_path / "model")
    generators.adopt(Checkpoint(path=job["url"], version="in shards"))  # proves itself by the sums


def test_a_tied_head_is_written_once_as_the_embedding(tiny_policy, tmp_path):
    model = tiny_policy.load()
    assert model.config.tie_word_embeddings
    write_weights(FullWeights(WHOLE, model), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    # vLLM's Gemma-2 refuses a file with a head of its own.
    assert written.keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in written


def test_a_remote_folder_is_whole_when_its_record_is_there(tiny_policy, monkeypatch):
    monkeypatch.setattr(launch, "rank", lambda: 0)
    url = "memory://exported/model"
    export_folder(FullWeights(WHOLE, tiny_policy.load()), None, url, None, head=None)
    files = sorted(fsspec.filesystem("memory").ls("/exported/model", detail=True), key=lambda file: file["created"])
    assert {file["name"].rpartition("/")[2] for file in files} >= {"config.json", "model.safetensors", RECORD_FILE}
    assert files[-1]["name"].endswith(RECORD_FILE)
    asyncio.run(asyncio.wait_for(wait_for_folder(url), 1))
    asyncio.run(asyncio.wait_for(wait_for_folder("a-hub/id"), 1))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(wait_for_folder("memory://exported"), 1))
