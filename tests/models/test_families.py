"""Every family of policies: log-probabilities, adapters and a step of DPO, as their own definitions have them."""

import pytest
import torch

from rayrl.config import DpoConfig, LoraConfig
from rayrl.data.collate import collate
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy, response_logprobs, turn_off_dropout
from rayrl.records import Checkpoint
from rayrl.training.dpo import pair_batch, pair_losses
from rayrl.training.sync.gather import merge_adapters
from tests.tiny_models import FAMILIES, make_tiny_model

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 700, (n,), generator=GENERATOR).tolist() for n in (2, 17, 40)]
RESPONSES = [torch.randint(3, 700, (n,), generator=GENERATOR).tolist() for n in (30, 5, 1)]
"""Longer than the sliding windows, and of different lengths: padding on both sides."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("families") / request.param, request.param)


def load(folder):
    return load_policy(Checkpoint(path=str(folder), version="tiny"), torch.float32).eval()


def alone(model, prompt, response):
    """The definition: one unpadded pass without positions of ours, log_softmax, sum over the response."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def test_log_probabilities_do_not_depend_on_the_batch(folder):
    model = load(folder)
    with torch.no_grad():
        together = response_logprobs(model, collate(PROMPTS, RESPONSES)).tolist()
        expected = [alone(model, prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert together == pytest.approx(expected, abs=1e-3)


def test_merged_adapters_are_the_adapted_model(folder):
    torch.manual_seed(0)
    adapted = add_lora(load(folder), LoraConfig(rank=4, alpha=8), Checkpoint(path=str(folder), version="tiny")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {name: p.detach().clone() for name, p in adapted.named_parameters(remove_duplicate=False)}
    merged = load(folder)
    missing, unexpected = merged.load_state_dict(merge_adapters(adapted, state), strict=False)
    assert not unexpected and not set(missing) & set(dict(merged.named_parameters()))
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        expected = response_logprobs(adapted, batch)
        torch.testing.assert_close(response_logprobs(merged, batch), expected, atol=1e-3, rtol=0)
        assert (response_logprobs(load(folder), batch) - expected).abs().max() > 1e-2


def test_a_step_of_dpo_starts_at_no_margin_and_makes_one(folder):
    model = load(folder)
    turn_off_dropout(model)
    model.train()
    rows = [
        {
            **{"chosen_id": f"{n}a", "rejected_id": f"{n}b", "prompt_token_ids": prompt},
            **{"chosen_token_ids": chosen, "rejected_token_ids": rejected},
            **{"chosen_reference_logprob": alone(model, prompt, chosen)},
            **{"rejected_reference_logprob": alone(model, prompt, rejected)},
        }
        for n, (prompt, chosen, rejected) in enumerate(
            zip(PROMPTS, RESPONSES, RESPONSES[1:] + RESPONSES[:1], strict=True)
        )
    ]
    batch, dpo = pair_batch(rows), DpoConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, _, _ = pair_losses(TokenLogprobs(model), batch, dpo)
    assert losses.tolist() == pytest.approx([0.6931] * 3, abs=1e-3)
    losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        after, chosen, rejected = pair_losses(TokenLogprobs(model), batch, dpo)
    assert after.mean() < losses.mean() - 0.01
    assert (chosen - rejected).mean() > 0
