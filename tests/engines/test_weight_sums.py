"""Sums of weights are those of the trainer however an engine holds them, and of no other weights."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from rayrl.engines.weight_folder import RECORD_FILE, expected_sums
from rayrl.engines.weight_sums import difference, folder_sums, group_of, grouped, joined, named_sums, tensor_sums

HIDDEN, HEAD, VOCABULARY, NUM_EXPERTS, EXPERT = 32, 8, 50, 4, 12


def trained(dtype=torch.bfloat16, num_layers=2):
    """Weights under the names of model files: two layers, one of them with experts, an embedding and an untied head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (0.05 * torch.randn(*shape, generator=generator)).to(dtype)

    weights = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    weights["model.norm.weight"] = 1 + random(HIDDEN)
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = 1 + random(HIDDEN)
        weights[f"{at}.self_attn.q_proj.weight"] = random(4 * HEAD, HIDDEN)
        weights[f"{at}.self_attn.k_proj.weight"] = random(2 * HEAD, HIDDEN)
        weights[f"{at}.self_attn.v_proj.weight"] = random(2 * HEAD, HIDDEN)
        weights[f"{at}.self_attn.o_proj.weight"] = random(HIDDEN, 4 * HEAD)
        weights[f"{at}.self_attn.o_proj.bias"] = random(HIDDEN)
        for expert in range(NUM_EXPERTS):
            weights[f"{at}.mlp.experts.{expert}.gate_proj.weight"] = random(EXPERT, HIDDEN)
            weights[f"{at}.mlp.experts.{expert}.up_proj.weight"] = random(EXPERT, HIDDEN)
            weights[f"{at}.mlp.experts.{expert}.down_proj.weight"] = random(HIDDEN, EXPERT)
    return weights


def served(weights, num_ranks=1):
    """The sums of each rank of an engine: joined, split and padded as vLLM does it."""
    ranks = [{} for _ in range(num_ranks)]

    def add(name, whole, dim=None):
        parts = [whole] * num_ranks if dim is None else whole.chunk(num_ranks, dim)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = tensor_sums(part)

    padding = torch.zeros(64 - VOCABULARY, HIDDEN, dtype=weights["lm_head.weight"].dtype)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        add(name, torch.cat([weights[name], padding]), 0)
    add("model.norm.weight", weights["model.norm.weight"])
    for layer in range(2):
        at = f"model.layers.{layer}"
        add(f"{at}.input_layernorm.weight", weights[f"{at}.input_layernorm.weight"])
        add(f"{at}.self_attn.o_proj.weight", weights[f"{at}.self_attn.o_proj.weight"].T.contiguous(), 0)  # transposed
        add(f"{at}.self_attn.o_proj.bias", weights[f"{at}.self_attn.o_proj.bias"])
        heads = [weights[f"{at}.self_attn.{part}_proj.weight"].chunk(num_ranks) for part in "qkv"]
        experts = [f"{at}.mlp.experts.{expert}" for expert in reversed(range(NUM_EXPERTS))]
        for number, rank in enumerate(ranks):
            rank[f"{at}.self_attn.qkv_proj.weight"] = tensor_sums(torch.cat([part[number] for part in heads]))
            inner = [weights[f"{expert}.{part}_proj.weight"] for expert in experts for part in ("gate", "up")]
            rank[f"{at}.mlp.experts.w13_weight"] = tensor_sums(torch.stack([w.chunk(num_ranks)[number] for w in inner]))
            columns = [weights[f"{e}.down_proj.weight"].chunk(num_ranks, 1)[number] for e in experts]
            rank[f"{at}.mlp.experts.w2_weight"] = tensor_sums(torch.stack(columns))
    return joined(ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joined_split_padded_and_transposed_weights_have_the_trainers_sums(dtype, num_ranks):
    weights = trained(dtype)
    assert difference(served(weights, num_ranks), grouped(named_sums(weights))) is None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_weight_that_is_one_unit_in_the_last_place_off_is_found(num_ranks):
    weights = trained()
    expected = grouped(named_sums(weights))
    weight = weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(1.0, dtype=weight.dtype))
    found = difference(served(weights, num_ranks), expected)
    assert found is not None and found.startswith("layer 1 sums to (")
    assert f"in the trainer layer 1 to ({expected['layer 1'][0]:.15g}, {expected['layer 1'][1]:.15g})" in found


def test_a_weight_outside_of_the_layers_equals_any_of_the_trainers():
    weights = trained()
    expected = grouped(named_sums(weights))
    sums = served(weights)
    sums["embedding"] = sums.pop("model.embed_tokens.weight")  # another name for it
    del sums["lm_head.weight"]  # an embedding engine
    sums["lm_head.packed_weight"] = sums["embedding"]  # a tied head
    assert difference(sums, expected) is None
    sums["lm_head.packed_weight"] = (1.0, 2.0)
    found = difference(sums, expected)
    assert found is not None and "lm_head.packed_weight sums to (1, 2)" in found and "model.norm.weight to (" in found


def test_a_layer_too_many_or_too_few_and_a_broken_weight_are_found():
    expected, sums = grouped(named_sums(trained())), served(trained())
    assert difference(sums, expected | {"layer 2": (0.0, 1.0)}) == "layer 2 of the trainer is not in the engine"
    assert "there is no such layer" in difference(sums | {"layer 2": (0.0, 1.0)}, expected)
    broken = {"layer 0": (math.nan, math.nan)}
    assert difference(sums | broken, expected | broken) is not None, "weights that are no numbers are never served"


def test_the_first_number_of_a_name_is_its_layer():
    assert group_of("transformer.h.11.attn.c_attn.weight") == group_of("h.11.mlp.c_fc.bias") == "layer 11"
    assert group_of("model.layers.3.block_sparse_moe.experts.5.w1.weight") == "layer 3"
    assert group_of("transformer.wte.weight") == "transformer.wte.weight"


def test_tensors_of_any_size_and_stride_are_added_up_in_float64():
    tensor = torch.full((1000, 700), 1 / 3, dtype=torch.float32)
    total, absolute = tensor_sums(-tensor.T)
    assert total == pytest.approx(-tensor.double().sum().item(), rel=1e-14)
    assert absolute == -total
    assert tensor_sums(torch.empty(0)) == (0.0, 0.0)


def test_a_ready_made_folder_is_summed_as_the_engine_rounds_it(tmp_path):
    weights = trained(torch.float32)
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    parts[1]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a constant, which nothing loads
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"model-{number}.safetensors")
    save_file(weights, tmp_path / "consolidated.safetensors")  # as some hub models have it beside the others
    index = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    assert difference(served(rounded, 2), folder_sums(tmp_path, "bfloat16")) is None
    assert difference(served(weights), folder_sums(tmp_path, "float32")) is None
    assert difference(served(weights), folder_sums(tmp_path, "bfloat16")) is not None


def test_the_trainers_record_counts_and_not_the_file_unless_it_is_of_another_dtype(tmp_path):
    weights = trained(torch.float32)
    save_file(weights, tmp_path / "model.safetensors")
    sums = {"layer 0": [1.0, 2.0]}
    (tmp_path / RECORD_FILE).write_text(json.dumps({"dtype": "float32", "sums": sums, "text": None}))
    assert expected_sums(tmp_path, "float32") == sums
    assert expected_sums(tmp_path, "bfloat16") == folder_sums(tmp_path, "bfloat16")
