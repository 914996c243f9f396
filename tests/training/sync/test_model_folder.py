"""Exported folders are read alike by transformers 5, which wrote them, and 4.57, whose names they hold too."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from rayrl.config import PolicyConfig
from rayrl.data.tokenizing import load_tokenizer
from rayrl.errors import ConfigError
from rayrl.models.policy import load_policy
from rayrl.records import Checkpoint
from rayrl.training import launch
from rayrl.training.sync.export import export_folder
from rayrl.training.sync.gather import FullWeights
from rayrl.training.sync.model_folder import with_old_names
from tests.chat_policies import CHATML, MODEL, chat_policy
from tests.tiny_models import FAMILIES, make_tiny_model
from tests.training.sync.test_export import WHOLE

OLD_NAMES = {
    "llama": {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {"rope_theta": 1_000_000.0},
    "qwen3": {"rope_theta": 1_000_000.0},
    "mistral": {"rope_theta": 10_000.0},
    "gemma2": {"rope_theta": 10_000.0},
    "gemma3_text": {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    "phi3": {"rope_theta": 20_000.0, "partial_rotary_factor": 1.0},
    "olmo2": {"rope_theta": 500_000.0},
    "gpt_neox": {"rotary_emb_base": 20_000.0, "rotary_pct": 0.5},
    "gpt2": {},
    "opt": {},
    "mixtral": {"rope_theta": 1_000_000.0},
    "qwen3_moe": {"rope_theta": 10_000.0, "num_experts": 4},
}
"""The names under which transformers 4.57 reads what 5 has renamed (its `configuration_*.py`)."""


def export(folder, policy, monkeypatch):
    """Export a policy as a training does, without the training."""
    monkeypatch.setattr(launch, "rank", lambda: 0)
    model = load_policy(Checkpoint(path=policy.path, version="start"), torch.float32)
    export_folder(FullWeights(WHOLE, model), policy, str(folder), None, head=None)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_has_the_names_of_transformers_4_too(family, tmp_path, monkeypatch):
    source = make_tiny_model(tmp_path / "start", family)
    model = export(tmp_path / "out", PolicyConfig(path=str(source)), monkeypatch)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert OLD_NAMES[family].items() <= config.items()
    assert ("rope_scaling" in config) == ("rope_scaling" in OLD_NAMES[family])
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert getattr(read, "rope_parameters", None) == getattr(model.config, "rope_parameters", None)
    again = load_policy(Checkpoint(path=str(tmp_path / "out"), version="out"), torch.float32)
    tokens = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=0)


def test_a_scaled_rotary_embedding_of_some_layers_keeps_its_scale():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = with_old_names({"rope_parameters": rope})
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


def test_the_tokenizer_is_the_policys_own(tmp_path, monkeypatch):
    policy = chat_policy(tmp_path / "start", without=["pad_token", "tokenizer_class", "backend"])
    export(tmp_path / "out", policy, monkeypatch)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
    exported = load_tokenizer(PolicyConfig(path=str(tmp_path / "out")))
    assert exported.pad_token is None, "the policy has none, and padding with the end of sequence hides it in training"
    assert exported.chat_template == CHATML


def test_a_tokenizer_of_transformers_5_gets_the_class_that_both_know(tmp_path, monkeypatch):
    policy = PolicyConfig(path=str(MODEL))
    export(tmp_path / "out", policy, monkeypatch)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "How do I boil rice?"
    original, exported = (AutoTokenizer.from_pretrained(folder) for folder in (MODEL, tmp_path / "out"))
    assert exported.encode(text) == original.encode(text)
    assert exported.pad_token == original.pad_token


@pytest.mark.parametrize(("prompt_format", "ends"), [("chat", ["</s>", "<|im_end|>"]), ("plain", ["</s>"])])
def test_generation_stops_where_a_turn_ends(tmp_path, monkeypatch, prompt_format, ends):
    policy = chat_policy(tmp_path / "start").model_copy(update={"prompt_format": prompt_format})
    export(tmp_path / "out", policy, monkeypatch)
    listed = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    ids = load_tokenizer(policy).convert_tokens_to_ids(ends)
    assert listed == (ids if len(ids) > 1 else ids[0])


@pytest.mark.parametrize(
    "shipped", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.2}, {"top_k": 20}]
)
def test_sampling_without_do_sample_is_mended_and_written(tmp_path, monkeypatch, shipped):
    source = make_tiny_model(tmp_path / "start")
    file = source / "generation_config.json"
    file.write_text(json.dumps(shipped | {"eos_token_id": [2, 5]}))
    export(tmp_path / "out", PolicyConfig(path=str(source)), monkeypatch)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["do_sample"] is True and written["eos_token_id"] == [2, 5]
    assert {name: written[name] for name in shipped if name != "do_sample"}.items() <= shipped.items()


def test_weights_that_are_missing_are_refused_and_not_drawn(tmp_path):
    source = make_tiny_model(tmp_path / "start")
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"policy.path must hold all weights of a LlamaForCausalLM, .*layers\.1\."):
        load_policy(Checkpoint(path=str(source), version="start"), torch.float32)
