"""Log-probabilities of responses do not depend on the batch they are read in."""

import pytest
import torch
from huggingface_hub import constants
from transformers import GptOssConfig, OPTConfig, OPTForCausalLM

from rayrl.config import LoraConfig, PolicyConfig
from rayrl.data.collate import collate
from rayrl.data.tokenizing import context_length, load_tokenizer
from rayrl.errors import ConfigError
from rayrl.models.policy import add_lora, attention_of, load_policy, response_logprobs, turn_off_dropout
from rayrl.records import Checkpoint
from tests.tiny_models import make_tiny_model

PROMPTS = [[1, 20, 30, 40], [1, 50], [1, 60, 70, 80, 90, 100]]
RESPONSES = [[5, 6], [7, 8, 9, 2], [2]]


def plain_logprob(model, prompt, response):
    """The definition: one unpadded forward pass, log_softmax, sum over the response."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def test_response_logprobs_are_those_of_the_unpadded_sequence(tiny_policy):
    model = tiny_policy.load()
    with torch.no_grad():
        batched = response_logprobs(model, collate(PROMPTS, RESPONSES)).tolist()
        expected = [plain_logprob(model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert batched == pytest.approx(expected, abs=1e-4)


def test_lora_changes_nothing_before_training_and_trains_only_adapters(tiny_policy):
    plain = tiny_policy.load()
    model = add_lora(tiny_policy.load(), LoraConfig(rank=4, alpha=8), tiny_policy.checkpoint)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {part for part in ("q_proj", "down_proj", "lm_head") if any(part in n for n in trained)} == {
        "q_proj",
        "down_proj",
    }
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(model, batch), response_logprobs(plain, batch))


def test_gradients_reach_the_adapters(tiny_policy):
    model = add_lora(tiny_policy.load(), LoraConfig(rank=4, alpha=8, target_modules=["q_proj"]), tiny_policy.checkpoint)
    response_logprobs(model, collate(PROMPTS, RESPONSES)).sum().backward()
    norms = {n: p.grad.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n}
    assert len(norms) == plain_layers(model)
    assert all(norm > 0 for norm in norms.values())


def plain_layers(model):
    return model.config.num_hidden_layers


def test_the_pinned_revision_of_a_hub_id_is_loaded(tmp_path, monkeypatch):
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate((("main", "a" * 40), ("pinned", "b" * 40))):
        (repository / "refs" / revision).write_text(commit)
        make_tiny_model(repository / "snapshots" / commit, seed=seed)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    for revision, commit in ((None, "a" * 40), ("main", "a" * 40), ("pinned", "b" * 40)):
        loaded = load_policy(Checkpoint(path="some/model", version="v", revision=revision), torch.float32)
        there = load_policy(Checkpoint(path=str(repository / "snapshots" / commit), version="v"), torch.float32)
        assert torch.equal(loaded.get_parameter(name), there.get_parameter(name))
    (repository / "snapshots" / ("a" * 40) / "config.json").unlink()
    (repository / "snapshots" / ("a" * 40) / "tokenizer.json").unlink()
    policy = PolicyConfig(path="some/model", revision="pinned")
    assert context_length(policy) == 256
    assert load_tokenizer(policy).eos_token == "</s>"


def test_the_attention_is_the_one_that_computes_the_models_config(tmp_path):
    models = {
        family: load_policy(
            Checkpoint(path=str(make_tiny_model(tmp_path / family, family)), version="v"), torch.float32
        )
        for family in ("llama", "gemma2")
    }
    assert {family: model.config._attn_implementation for family, model in models.items()} == {
        "llama": "sdpa",
        "gemma2": "eager",  # torch's fused attention has no soft cap
    }
    assert attention_of(GptOssConfig()) is None


def test_the_soft_cap_of_attention_counts(tmp_path):
    model = load_policy(Checkpoint(path=str(make_tiny_model(tmp_path / "m", "gemma2")), version="v"), torch.float32)
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        capped = response_logprobs(model, batch)
        model.set_attn_implementation("sdpa")
        assert (response_logprobs(model, batch) - capped).abs().max() > 1e-3


def opt(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, **settings))


def test_without_dropout_training_mode_reads_what_evaluation_mode_reads():
    model = opt(dropout=0.2, attention_dropout=0.2, layerdrop=0.5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = collate(PROMPTS, RESPONSES)
    expected = response_logprobs(model.eval(), batch)
    assert (response_logprobs(model.train(), batch) - expected).abs().max() > 1e-3
    turn_off_dropout(model)
    torch.testing.assert_close(response_logprobs(model.train(), batch), expected)
    assert model.training
    assert (model.config.dropout, model.config.layerdrop) == (0.2, 0.5), "the exported config is the model's own"


def test_adapters_are_refused_on_what_is_no_linear_layer(tiny_policy):
    with pytest.raises(ConfigError, match=r"must name linear layers of the model, got embed_tokens; .* are down_proj,"):
        add_lora(tiny_policy.load(), LoraConfig(target_modules=["q_proj", "embed_tokens"]), tiny_policy.checkpoint)
