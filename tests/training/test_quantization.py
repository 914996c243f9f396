"""QLoRA: frozen weights in 4 bits, and adapters that are merged with what the 4 bits stand for."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rayrl.config import DpoConfig, LoraConfig, PolicyConfig, SftConfig
from rayrl.data.collate import collate
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy, response_logprobs
from rayrl.models.quantization import BLOCK, dequantized, is_quantized
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync.export import export_policy

BATCH = collate([[1, 20, 30, 40], [1, 50]], [[5, 6], [7, 8, 9, 2]])
LORA = LoraConfig(rank=4, alpha=8, quantization="nf4")


def test_linear_weights_are_frozen_in_four_bits_and_all_else_stays(tiny_policy):
    plain = dict(tiny_policy.load().named_parameters())
    model = add_lora(tiny_policy.load(), LORA, tiny_policy.checkpoint)
    num_quantized = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.requires_grad
            continue
        assert not parameter.requires_grad
        before = plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")]
        assert dequantized(parameter).shape == before.shape
        if not is_quantized(parameter):
            assert torch.equal(parameter, before)
            continue
        num_quantized += 1
        assert ".base_layer." in name
        assert parameter.numel() == before.numel() / 2  # two numbers in a byte
        # Half of the widest gap between two NF4 numbers (arXiv 2305.14314, appendix E), and the error of the scales.
        blocks = before.reshape(-1, BLOCK)
        errors = (dequantized(parameter).reshape(-1, BLOCK) - blocks).abs().amax(1) / blocks.abs().amax(1)
        assert 0 < errors.max() < 0.304 / 2 + 0.02
    # All but down_proj, whose 352 inputs are no whole blocks.
    assert num_quantized == 6 * model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exported_is_what_was_trained(process_group, tiny_policy, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(launch, "rank", lambda: 0)
    policy = add_lora(load_policy(tiny_policy.checkpoint, dtype), LORA, tiny_policy.checkpoint)
    frozen = {name: copy.deepcopy(p.data) for name, p in policy.named_parameters() if is_quantized(p)}
    training = SftConfig(learning_rate=1e-2, lora=LORA, schedule="constant", warmup_ratio=0)
    engine = zero.start(TokenLogprobs(policy), training, dtype, 4)
    engine.train()
    losses = [
        zero.train_step(engine, [BATCH], lambda batch: -engine(batch).sum(), 6, collate([[0]], [[0]])).loss
        for _ in range(4)
    ]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(dict(policy.named_parameters())[name], data) for name, data in frozen.items())

    folder = str(tmp_path / "m1")
    export_policy(engine, policy, PolicyConfig(path=tiny_policy.path), folder)
    written = load_file(f"{folder}/model.safetensors")
    assert {weight.dtype for weight in written.values()} == {dtype}
    assert "quantization_config" not in json.loads((tmp_path / "m1/config.json").read_text())
    assert (tmp_path / "m1/adapter/adapter_model.safetensors").exists()
    exported = load_policy(Checkpoint(path=folder, version="m1"), dtype).eval()
    policy.eval()
    with torch.no_grad():
        expected, found = response_logprobs(policy, BATCH), response_logprobs(exported, BATCH)
    torch.testing.assert_close(found, expected, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=0)


def test_training_goes_on_from_a_checkpoint_without_the_frozen_weights(process_group, tiny_policy, tmp_path):
    def start():
        torch.manual_seed(0)
        policy = add_lora(load_policy(tiny_policy.checkpoint, torch.float32), LORA, tiny_policy.checkpoint)
        engine = zero.start(TokenLogprobs(policy), SftConfig(learning_rate=1e-2, lora=LORA), torch.float32, 8)
        engine.train()
        return engine

    def steps(engine, num):
        idle = collate([[0]], [[0]])
        return [zero.train_step(engine, [BATCH], lambda batch: -engine(batch).sum(), 6, idle).loss for _ in range(num)]

    engine = start()
    steps(engine, 2)
    zero.save(engine, str(tmp_path), {})()
    expected = steps(engine, 2)
    again = start()
    zero.load(again, str(tmp_path))
    assert steps(again, 2) == pytest.approx(expected, rel=1e-6)


def test_the_reference_is_the_quantised_policy():
    with pytest.raises(ValidationError, match=r'dpo.reference must be "auto", "pass" or "none" with dpo.lora.quant'):
        DpoConfig(lora=LORA, reference="generation")


def test_four_bits_are_not_sharded():
    with pytest.raises(ValidationError, match=r"zero_stage must be 0, 1 or 2 with lora.quantization, got 3"):
        SftConfig(lora=LORA, zero_stage=3)
