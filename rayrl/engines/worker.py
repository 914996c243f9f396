"""Extension of vLLM's worker processes: the sums of the weights that a worker serves, and reloads on CPUs made whole.

vLLM imports this module in every worker, before the model is loaded (its argument `worker_extension_cls`).

On GPUs a worker reads the parameters themselves, as its kernels do. On CPUs vLLM hands the weight of a linear layer to
oneDNN, which keeps a packed copy inside its own memory and cannot give it back, and removes the parameter. There the
sums are taken of the tensor at the moment it is packed, and stay with the layer until it is packed again. They prove
which numbers were handed to the kernel that the layer has now, not what the kernel made of them; a test reads them back
through the kernel. Experts are packed on CPUs by changing their order and padding them with zeros, which leaves their
sums as they are.

vLLM 0.32.0 leaves two packed copies as they were when it reloads weights on CPUs. A tied head, which has no name in a
model's files, is packed again by `pack_tied_heads`. Experts are packed after the first load only; later ones reach the
kernel in the wrong order, which sums cannot show. They are packed after each load here (`_pack_experts_on_each_load`).
"""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from rayrl.engines.weight_sums import TensorSums, tensor_sums


class WorkerExtension:
    """Methods that vLLM adds to its worker class. A class of your own in `worker_extension_cls` derives from it."""

    def served_weight_sums(self) -> dict[str, TensorSums]:
        """Return the sums of each of this rank's parameters by name."""
        return parameter_sums(self.get_model())  # type: ignore[attr-defined]

    def pack_tied_heads(self) -> None:
        """Pack this rank's tied heads for the CPU, after new weights; on GPUs there is nothing to pack."""
        if current_platform.is_cpu():
            pack_tied_heads(self.get_model())  # type: ignore[attr-defined]


def pack_tied_heads(model: nn.Module) -> None:
    """Pack each output head that shares the embedding's weight from the weight as it is now."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    layers = [layer for layer in layers if isinstance(layer.quant_method, UnquantizedEmbeddingMethod)]
    embeddings = [layer.weight for layer in layers if not isinstance(layer, ParallelLMHead)]
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and any(layer.weight is embedding for embedding in embeddings):
            layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def parameter_sums(model: nn.Module) -> dict[str, TensorSums]:
    """Return the sums of a model's parameters as they are served, packed ones included."""
    layers = dict(model.named_modules())
    sums: dict[str, TensorSums] = {}
    for name, parameter in model.named_parameters():  # one that is shared comes once
        if parameter.numel() > 0:
            sums[name] = rank_sums(layers[name.rpartition(".")[0]], parameter)
    for name, layer in layers.items():
        packed: TensorSums | None = getattr(layer, "packed_weight_sums", None)
        if packed is not None:
            sums[f"{name}.packed_weight"] = packed
    return sums


def rank_sums(layer: Any, weight: Tensor) -> TensorSums:
    """Return the sums of a rank's part of a weight; a key and value head that n ranks hold counts 1/n on each."""
    if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
        num_query_rows = layer.num_heads * layer.head_size
        queries, others = tensor_sums(weight[:num_query_rows]), tensor_sums(weight[num_query_rows:])
        share = 1 / layer.num_kv_head_replicas
        return queries[0] + share * others[0], queries[1] + share * others[1]
    return tensor_sums(weight)


def _note_sums_when_packed() -> None:
    """Take the sums of each linear layer's weight before vLLM packs it for the CPU."""
    pack = layer_utils.dispatch_cpu_unquantized_gemm

    def noting_pack(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        pack(layer, remove_weight)
        # A weight that is still there and is not kept beside its packed copy was not packed.
        is_packed = not weight.is_meta and weight.ndim == 2 and (layer.weight.numel() == 0 or not remove_weight)
        layer.packed_weight_sums = rank_sums(layer, weight) if is_packed else None

    layer_utils.dispatch_cpu_unquantized_gemm = noting_pack


def _pack_experts_on_each_load() -> None:
    """Pack experts for the CPU after each load of their weights, and not only after the first."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def packing_set_up(method: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        set_up(method, layer, w13, w2)
        if layer.w13_weight is w13:  # vLLM puts new parameters there when it packs
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = packing_set_up  # type: ignore[assignment]


if current_platform.is_cpu():
    _note_sums_when_packed()
    _pack_experts_on_each_load()
