"""Packed sequences, padded ones and each on its own give the same states and gradients, in every family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayrl.config import LoraConfig
from rayrl.data.collate import collate
from rayrl.models import policy as policy_module
from rayrl.models.packing import hidden_states, is_packed
from rayrl.models.policy import add_lora, has_known_head, response_logprobs
from rayrl.records import Checkpoint

PROMPTS = [[1, 20, 30, 40], [1, 50], [1, 60, 70, 80, 90, 11, 12, 13, 14, 15, 16]]
RESPONSES = [[5, 6], [7, 8, 9, 2, 21, 22, 23, 24, 25], [2]]
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LEARNED_POSITIONS = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | WINDOW,
    "qwen2": SIZES | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS,
    "gemma2": SIZES | WINDOW | {"final_logit_softcapping": 0.5},
    "gemma3_text": SIZES | WINDOW,
    "phi3": SIZES,
    "phi": SIZES | {"num_key_value_heads": 4},
    "olmo2": SIZES,
    "gpt_neox": SIZES,
    "gpt2": LEARNED_POSITIONS,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere": SIZES | {"logit_scale": 0.3},
    "granite": SIZES | {"logits_scaling": 3.0},
    "gptj": LEARNED_POSITIONS | {"rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": VOCAB},
    "hyperclovax": SIZES | {"logits_scaling": 3.0},  # which multiplies here, and divides in Granite
}
PADDED = {"gptj", "bloom", "mamba"}
"""Families whose sequences are not packed; Gemma-2's are not with its own attention."""
OWN_HEAD = {"hyperclovax"}
"""Families whose logits are not the head's output, scaled or bounded in a way that is known."""


def make(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | NO_DROPOUT | {"initializer_range": 0.2} | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=changes.get("attn_implementation"))
    return model.float().train()


def plain_logprobs(model):
    """The definition: an unpadded forward pass of each sequence, log_softmax, sum over the response."""
    sums = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        targets = torch.tensor(response)
        sums.append(logprobs[len(prompt) - 1 : -1].gather(-1, targets[:, None]).sum())
    return torch.stack(sums)


def with_gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return logprobs.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_plain(model):
    """Log-probabilities and gradients are those of the definition."""
    expected, expected_gradients = with_gradients(model, plain_logprobs(model))
    found, gradients = with_gradients(model, response_logprobs(model, collate(PROMPTS, RESPONSES)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        if theirs is None:  # it is frozen
            assert mine is None
            continue
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_each_sequence_alone(family):
    model = make(family)
    assert_plain(model)
    assert is_packed(model) == (family not in PADDED)
    assert has_known_head(model) == (family not in OWN_HEAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_chunks_change_nothing(family, monkeypatch):
    monkeypatch.setattr(policy_module, "LOGIT_BYTES", 5 * 4 * VOCAB)  # of 5 tokens; the batch has 12
    assert_plain(make(family))


def test_eager_attention_is_padded():
    model = make("gemma2", attn_implementation="eager")
    assert not is_packed(model)
    assert_plain(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_gradient_checkpoints_change_nothing(family):
    model = make(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_plain(model)


def test_adapters_are_trained(monkeypatch):
    monkeypatch.setattr(policy_module, "LOGIT_BYTES", 5 * 4 * VOCAB)
    lora = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "down_proj"])
    model = add_lora(make("llama"), lora, Checkpoint(path="made-up", version="tiny"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert_plain(model)


def test_a_model_reads_padded_batches_as_before():
    """Once it has read packed sequences, a mask still masks."""
    model = make("mistral").eval()
    ids = torch.tensor([[0, 0, 0, 1, 20, 30], [1, 50, 60, 70, 80, 90]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        hidden_states(model, collate(PROMPTS, RESPONSES))
        after = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(after, before)
