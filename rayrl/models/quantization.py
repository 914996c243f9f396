"""Frozen weights in 4 bits under low-rank adapters: QLoRA (arXiv 2305.14314)."""

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK = 64
"""Weights that share a scale."""


def quantize(model: "PreTrainedModel", layer_names: list[str]) -> None:
    """Replace the weights of linear layers by 4-bit NormalFloat numbers, with double quantisation (section 3).

    A layer computes in the type that its weights had: they are dequantised for each call, and never kept so. A layer
    whose number of inputs is no multiple of BLOCK keeps its weights: on CPUs bitsandbytes 0.50.2 misreads blocks that
    go on in the next row. Such sizes are rare in models that are large enough to be quantised.

    Args:
        model: whole on this rank; it is changed in place.
        layer_names: last parts of the layers' names, as `rayrl.models.policy.linear_names` gives them.
    """
    bnb: Any = importlib.import_module("bitsandbytes")  # its types are not those of torch that they are used as
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name.rpartition(".")[2] not in layer_names:
            continue
        if layer.in_features % BLOCK != 0:
            continue
        weight = layer.weight.detach()
        quantized = bnb.nn.Linear4bit(
            *(layer.in_features, layer.out_features),
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device=torch.device("meta"),
        )
        numbers = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.weight = numbers.to(weight.device)  # computes the numbers
        quantized.bias = layer.bias
        # Else some CPUs' layers repack their weights in evaluation, and round their scales to bfloat16.
        quantized.support_avx512bf16_for_cpu = False
        model.set_submodule(name, quantized)
    # peft chooses its adapters for such layers by this attribute.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def is_quantized(parameter: Tensor) -> bool:
    """Return whether a parameter holds 4-bit numbers."""
    return getattr(parameter, "quant_state", None) is not None


def dequantized(parameter: Tensor) -> Tensor:
    """Return the weights that a parameter stands for: of 4-bit numbers, what their layer computes with."""
    if not is_quantized(parameter):
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]


def dequantized_like(parameter: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and type of what `dequantized` returns, without computing it."""
    state = getattr(parameter, "quant_state", None)
    return (parameter.shape, parameter.dtype) if state is None else (torch.Size(state.shape), state.dtype)
