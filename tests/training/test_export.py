"""What is exported is what was trained."""

import torch

from rayrl.config import LoraConfig
from rayrl.models.policy import add_lora
from rayrl.training.export import PROBE_TOKENS, merge_adapters, probe_prompt


def test_merge_adapters_is_pefts(tiny_policy):
    model = add_lora(tiny_policy.load(), LoraConfig(rank=4, alpha=6))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    state = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    merged = merge_adapters(model, state)
    expected = dict(model.merge_and_unload().named_parameters(remove_duplicate=False))
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name].detach(), atol=1e-5, rtol=1e-5)
    plain = tiny_policy.load().state_dict()
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.weight"]
    )


def test_the_probe_is_long_fixed_and_within_the_context(tiny_policy):
    config = tiny_policy.load().config
    prompt = probe_prompt(config)
    assert prompt == probe_prompt(config)
    assert len(prompt) == PROBE_TOKENS
    config.max_position_embeddings = 64
    assert len(probe_prompt(config)) == 62
    assert max(prompt) < config.vocab_size
