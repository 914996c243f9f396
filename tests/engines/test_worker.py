"""The sums that a worker reports are those of the weights that its kernels multiply with."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.linear import QKVParallelLinear

from rayrl.engines.weight_sums import grouped, joined, named_sums, tensor_sums
from rayrl.engines.worker import parameter_sums, rank_sums

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
