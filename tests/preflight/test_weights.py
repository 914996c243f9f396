"""Weights by their headers: whole models of every family pass, and what is missing or cut off is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from rayrl.errors import ConfigError
from rayrl.models.policy import linear_names, load_policy
from rayrl.preflight.weights import check_complete, read_weights
from rayrl.records import Checkpoint
from tests.tiny_models import FAMILIES, make_tiny_model


def read(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    weights = read_weights(str(folder), str(folder), may_come=False)
    check_complete(weights, config, str(folder))
    return weights


def refusal(folder, **changes):
    with pytest.raises(ConfigError) as refused:
        read(folder, **changes)
    return str(refused.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture
def model(whole, tmp_path):
    """A copy to be broken."""
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_of_every_family_pass(family, tmp_path):
    folder = make_tiny_model(tmp_path, family)
    weights = read(folder)
    model = load_policy(Checkpoint(path=str(folder), version=""), torch.float32)
    assert set(linear_names(model)) <= set(weights.linear_names), "an adapter on any of them is accepted"
    if family not in ("mixtral", "qwen3_moe"):  # whose files have a matrix for each expert
        assert weights.num_parameters == sum(weight.numel() for weight in model.parameters())


def rewrite(folder, keep):
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if keep(name)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layers.1.", "must hold all 2 layers that its config.json names"),
        ("layers.0.mlp.up_proj", "whose layer 0 lacks mlp.up_proj.weight, which its other layers have"),
        ("embed_tokens", "must hold the embedding of its tokens"),
    ],
)
def test_what_is_missing_is_named(model, lost, message):
    rewrite(model, lambda name: lost not in name)
    assert message in refusal(model) and "at random" in refusal(model)


def test_sizes_of_config_and_weights_agree(model):
    assert "embedding for each of the 1,000 tokens" in refusal(model, vocab_size=1000)
    assert "must hold an output head beside the embedding" in refusal(model, tie_word_embeddings=False)
    assert "all 3 layers" in refusal(model, num_hidden_layers=3)
    read(model, num_hidden_layers=1)  # more layers than it names: some families keep a layer for training only


def test_layers_of_several_kinds_are_compared_with_their_own(model):
    rewrite(model, lambda name: "layers.0.mlp.up_proj" not in name)
    assert "whose layer 0 lacks mlp.up_proj.weight" in refusal(model), "layers of one kind"
    read(model, layer_types=["sliding_attention", "full_attention"])
    read(model, use_cla=True)


def test_files_that_are_not_whole_are_refused(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    assert f"is cut off: it has {len(content) // 2:,} bytes of {len(content):,}" in refusal(model)
    for size in (100, 5, 0):
        os.truncate(file, size)
        assert "is cut off" in refusal(model)
    file.write_bytes(content + b"more")
    assert "must have" in refusal(model) and "download it again" in refusal(model)
    file.write_bytes(bytes(range(256)) * 100)
    assert "its header cannot be read: it is damaged or encrypted" in refusal(model)
    file.write_bytes(len(b"[1, 2]").to_bytes(8, "little") + b"[1, 2]")
    assert "its header cannot be read" in refusal(model)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2611712\n")
    assert "is a pointer of Git LFS" in refusal(model) and "git lfs pull" in refusal(model)


def test_shards_are_all_there(model):
    shard = model / "model-00001-of-00002.safetensors"
    (model / "model.safetensors").rename(shard)
    assert "must hold model.safetensors.index.json beside its shards" in refusal(model)
    index = dict.fromkeys(load_file(shard), shard.name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    read(model)
    index["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "model-00002-of-00002.safetensors of model.safetensors.index.json is missing" in refusal(model)
    assert read_weights(str(model), "someone/model", may_come=True) is None, "the run downloads it"
    (model / "model.safetensors.index.json").write_text("{")
    assert "must be JSON" in refusal(model)
    Path(shard).unlink()
    (model / "model.safetensors.index.json").unlink()
    assert "must hold weights as model.safetensors" in refusal(model)
