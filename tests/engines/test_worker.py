"""The sums that a worker reports are those of the weights that its kernels multiply with, also after a reload."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rayrl.engines.weight_sums import grouped, joined, named_sums, tensor_sums
from rayrl.engines.worker import pack_tied_heads, parameter_sums, rank_sums

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM packs weights on CPUs only")


def linear(dtype, seed):
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.weight = nn.Parameter((0.05 * torch.randn(96, 64)).to(dtype), requires_grad=False)
    return layer


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weights_sums_are_those_that_its_kernel_multiplies_with(dtype):
    layer = linear(dtype, 0)
    whole = layer.weight.data
    for keep in (False, True):  # a linear layer, and an embedding that is the output head too
        layer.weight = nn.Parameter(whole, requires_grad=False)
        layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=not keep)
        assert layer.weight.numel() == (whole.numel() if keep else 0)
        # A unit vector times the weight is a column of it, exactly: all other products are zeros.
        columns = layer.cpu_linear(torch.eye(64, dtype=dtype), layer.weight, None)
        assert torch.equal(columns.T, whole)
        model = nn.ModuleDict({"proj": layer})
        reported = parameter_sums(model)
        assert list(reported) == (["proj.weight"] if keep else []) + ["proj.packed_weight"]
        for sums in reported.values():
            assert sums == pytest.approx(tensor_sums(columns), rel=1e-12)


@needs_cpu
def test_a_layer_that_is_not_packed_again_keeps_the_sums_of_its_old_weight():
    layer = linear(torch.bfloat16, 0)
    old = tensor_sums(layer.weight)
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert parameter_sums(nn.ModuleDict({"proj": layer})) == {"proj.packed_weight": old}
    layer.weight = linear(torch.bfloat16, 1).weight
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.packed_weight_sums != old


@needs_cpu
def test_a_tied_head_multiplies_with_the_embedding_as_it_is_after_a_reload():
    layers = {}
    for name, kind in {"embed_tokens": VocabParallelEmbedding, "lm_head": ParallelLMHead}.items():
        layers[name] = kind.__new__(kind)
        nn.Module.__init__(layers[name])
        layers[name].quant_method = UnquantizedEmbeddingMethod()
    embedding, head = layers["embed_tokens"], layers["lm_head"]
    embedding.weight = head.weight = linear(torch.float32, 0).weight
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    new = linear(torch.float32, 1).weight
    embedding.weight.data.copy_(new)  # as a reload does, which packs only the embedding
    embedding.quant_method.process_weights_after_loading(embedding)

    model = nn.ModuleDict(layers)
    assert parameter_sums(model)["lm_head.packed_weight"] != tensor_sums(new), "the check of a swap would show it"
    pack_tied_heads(model)
    assert torch.equal(head.cpu_linear(torch.eye(64), head.weight, None).T, new)
    assert parameter_sums(model)["lm_head.packed_weight"] == tensor_sums(new)


@needs_cpu
def test_experts_are_packed_at_each_load():
    experts = CPUUnquantizedExperts.__new__(CPUUnquantizedExperts)
    experts.moe_config = SimpleNamespace(intermediate_size_per_partition=32, activation=MoEActivation.SILU)
    method = SimpleNamespace(unquantized_backend=UnquantizedMoeBackend.CPU, moe_kernel=None)
    method._init_moe_kernel = lambda _: setattr(method, "moe_kernel", SimpleNamespace(fused_experts=experts))
    layer = nn.Module()
    layer.moe_config, layer.activation = experts.moe_config, MoEActivation.SILU
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded = {"w13_weight": torch.randn(2, 64, 32), "w2_weight": torch.randn(2, 32, 32)}
        for name, weight in loaded.items():
            setattr(layer, name, nn.Parameter(weight.clone(), requires_grad=False))
        UnquantizedFusedMoEMethod._setup_kernel(method, layer, w13=layer.w13_weight, w2=layer.w2_weight)
        for name, weight in loaded.items():
            packed = cpu_prepack_moe_weight(weight, experts.isa)
            assert torch.equal(getattr(layer, name), packed) and not torch.equal(packed, weight)


def test_a_head_that_several_ranks_hold_counts_once():
    torch.manual_seed(0)
    q, k, v = torch.randn(8 * 4, 16), torch.randn(2 * 4, 16), torch.randn(2 * 4, 16)
    ranks = []
    for rank in range(4):  # of 8 query heads two on each, of 2 key-value heads one, so that two ranks share it
        layer = QKVParallelLinear.__new__(QKVParallelLinear)
        layer.__dict__.update(num_heads=2, head_size=4, num_kv_head_replicas=2)
        shared = slice(rank // 2 * 4, rank // 2 * 4 + 4)
        own = torch.cat([q[rank * 8 : rank * 8 + 8], k[shared], v[shared]])
        ranks.append({"model.layers.0.qkv_proj.weight": rank_sums(layer, own)})
    whole = grouped(named_sums({f"model.layers.0.{name}.weight": w for name, w in {"q": q, "k": k, "v": v}.items()}))
    assert joined(ranks)["layer 0"] == pytest.approx(whole["layer 0"], rel=1e-12)


def test_a_shared_parameter_is_reported_once():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4)})
    model["head"] = nn.Linear(4, 8, bias=False)
    model["head"].weight = model["embed"].weight
    assert list(parameter_sums(model)) == ["embed.weight"]
