"""A ready-made reward model that cannot be served, or reads other tokens, is refused in one message."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.ready_made_reward_model import inspect_reward_model

MODEL = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}


def save_model(folder, *, head=(1, 64), vocab=("[UNK]", "a"), **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")).save(
        str(folder / "tokenizer.json")
    )
    if head:
        (folder / "head").mkdir()
        tensors = {"weight": np.zeros(head, np.float32), "bias": np.zeros(head[0], np.float32)}
        save_file(tensors, folder / "head" / "head.safetensors")
    return str(folder)


def config(tmp_path, path, **reward_model):
    policy = save_model(tmp_path / "policy", head=None, head_dim=32)
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": str(tmp_path / "run"),
            "policy": {"path": policy},
            "pool": {"path": "prompts.jsonl"},
            "sft": {"enabled": False},
            "select": {"budget": 2},
            "oracle": {"type": "scripted", "function": "a:b"},
            "reward_model": {"path": path} | reward_model,
        }
    )


def refusal(tmp_path, path):
    with pytest.raises(ConfigError) as refused:
        inspect_reward_model(config(tmp_path, path))
    message = str(refused.value)
    assert message.startswith("reward_model.path must ")
    assert str(path) in message
    return message


def test_a_model_that_fits_passes(tmp_path):
    inspect_reward_model(config(tmp_path, save_model(tmp_path / "reward")))  # head_dim unsaid: as the others imply


def test_without_one_there_is_nothing_to_inspect(tmp_path):
    inspect_reward_model(config(tmp_path, None))


def test_a_folder_that_is_not_there(tmp_path):
    assert "there is no such folder" in refusal(tmp_path, str(tmp_path / "nowhere"))


def test_several_outputs(tmp_path):
    message = refusal(tmp_path, save_model(tmp_path / "reward", head=(3, 64)))
    assert "a head with one output, got 3" in message
    assert "leave it out to fit one" in message


def test_a_classifier_of_another_kind(tmp_path):
    labels = {"0": "no", "1": "maybe", "2": "yes"}
    assert "a classifier of 3 outputs" in refusal(tmp_path, save_model(tmp_path / "reward", head=None, id2label=labels))


def test_no_head_at_all(tmp_path):
    assert "head/head.safetensors" in refusal(tmp_path, save_model(tmp_path / "reward", head=None))


def test_a_head_of_another_width(tmp_path):
    assert "as wide as its model (64), got 32" in refusal(tmp_path, save_model(tmp_path / "reward", head=(1, 32)))


def test_another_shape(tmp_path):
    message = refusal(tmp_path, save_model(tmp_path / "reward", num_hidden_layers=3))
    assert "has num_hidden_layers 3 where" in message
    assert "has 2" in message


def test_another_tokenizer(tmp_path):
    message = refusal(tmp_path, save_model(tmp_path / "reward", vocab=("a", "[UNK]")))
    assert "must have the policy's tokenizer" in message


def test_no_ensemble_of_a_ready_made_model(tmp_path):
    with pytest.raises(ValueError, match="num_members must be 1 with a ready-made"):
        config(tmp_path, "reward", num_members=2)
