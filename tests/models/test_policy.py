"""Log-probabilities of responses do not depend on the batch they are read in."""

import pytest
import torch

from rayrl.config import LoraConfig
from rayrl.data.collate import collate
from rayrl.models.policy import add_lora, response_logprobs

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
    model = add_lora(tiny_policy.load(), LoraConfig(rank=4, alpha=8))
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
    model = add_lora(tiny_policy.load(), LoraConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    response_logprobs(model, collate(PROMPTS, RESPONSES)).sum().backward()
    norms = {n: p.grad.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n}
    assert len(norms) == plain_layers(model)
    assert all(norm > 0 for norm in norms.values())


def plain_layers(model):
    return model.config.num_hidden_layers
