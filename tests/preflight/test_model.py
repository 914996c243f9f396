"""Policies that no engine can serve."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from rayrl.errors import ConfigError
from rayrl.preflight import check
from rayrl.preflight.model import CPU_HEAD_DIMS
from tests.preflight.trees import TWO_CPUS, changed, refusal, save_model


def test_policies_that_are_no_models_are_refused(tree, tmp_path):
    remedy = "; give the folder that save_pretrained wrote, or a hub id"
    message = refusal(ConfigError, changed(tree, policy__path="/nowhere/model"))
    assert message.endswith(f"got /nowhere/model: there is no such folder{remedy}")
    (tmp_path / "bare").mkdir()
    message = refusal(ConfigError, changed(tree, policy__path=str(tmp_path / "bare")))
    assert "policy.path must be a model folder with a config.json" in message and message.endswith(remedy)
    folder = save_model(tmp_path / "pickled")
    os.rename(f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin")
    assert "must hold weights as model.safetensors" in refusal(ConfigError, changed(tree, policy__path=folder))


def test_a_hub_model_that_is_not_here_is_unknown_to_the_plan(tree, monkeypatch):
    import huggingface_hub.constants

    config = changed(tree, policy__path="someone/a-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    plan = check(config, cluster=TWO_CPUS)
    assert plan.disk_bytes is None
    assert any("prompt lengths are not checked" in warning for warning in plan.warnings)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids to ask the hub" in refusal(ConfigError, config)


def test_a_head_dim_only_gpus_have_is_refused_without_one(tree, tmp_path):
    config = changed(tree, policy__path=save_model(tmp_path / "small", num_attention_heads=8))
    assert "head_dim must be one of 32, 64, 80" in refusal(ConfigError, config)
    check(config, cluster={"CPU": 8.0, "GPU": 2.0})


def test_a_family_that_vllm_misreads_on_cpus_is_refused_without_a_gpu(tree, tmp_path):
    config = changed(tree, policy__path=save_model(tmp_path / "neox"))
    file = tmp_path / "neox" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt_neox"}))
    assert "must not be a GPT-NeoX model" in refusal(ConfigError, config)
    check(config, cluster={"CPU": 8.0, "GPU": 2.0})


def test_head_dims_are_those_of_the_installed_vllm():
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    source = Path(spec.submodule_search_locations[0], "v1", "attention", "backends", "cpu_attn.py").read_text()
    found = re.search(r"def get_supported_head_sizes.*?return \[([\d, ]+)\]", source, re.DOTALL)
    assert found and tuple(map(int, found[1].split(","))) == CPU_HEAD_DIMS


def test_json_files_that_are_broken_are_named_with_the_setting(tree, rlp_tree, tmp_path):
    folder = save_model(tmp_path / "broken")
    (tmp_path / "broken" / "generation_config.json").write_text('{"temperature": ')
    assert "policy.path: " in refusal(ConfigError, changed(tree, policy__path=folder))
    (tmp_path / "nli" / "config.json").write_text("[]")
    message = refusal(ConfigError, changed(rlp_tree))
    assert message.startswith("refresh.spg.entailment_model: ") and "must be a table in JSON" in message
    (tmp_path / "broken" / "generation_config.json").unlink()
    (tmp_path / "broken" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert "must hold a tokenizer that can be read" in refusal(ConfigError, changed(tree, policy__path=folder))


def test_a_part_of_a_hub_model_is_refused_offline_and_downloaded_else(tree, tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder = Path(save_model(tmp_path / "snapshot"))
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("rayrl.preflight.model.model_folder", lambda *_, **__: str(folder))
    config = changed(tree, policy__path="someone/a-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert any("its weights are not on this machine" in w for w in check(config, cluster=TWO_CPUS).warnings)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "of which the hub's cache has a part only" in refusal(ConfigError, config)
