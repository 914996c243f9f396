"""Gathering of a model's full weights, one bucket at a time: nothing sharded, adapters merged.

No rank ever holds the whole of a model that is trained in shards: a bucket goes out, to a file or to the replicas,
before the next one is gathered.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayrl.engines.weight_sums import Sums, TensorSums, grouped, named_sums
from rayrl.training import deepspeed_engine as zero

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MAX_BUCKET_BYTES = 256 << 20
Bucket = dict[str, Tensor]
"""Weights by name."""
_PEFT_PREFIX = "base_model.model."
"""PEFT's, before the names of the model that it adapts."""


def split_into_buckets(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split names, in order, into buckets of at most `max_bytes`; only a layer that is larger alone exceeds it.

    Args:
        sizes: bytes of each parameter by name. A layer and its adapters stay together.
        max_bytes: of one bucket.
    """
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(layer_of(name), []).append(name)
    buckets: list[list[str]] = []
    room = 0
    for names in layers.values():
        num_bytes = sum(sizes[name] for name in names)
        if not buckets or num_bytes > room:
            buckets.append([])
            room = max_bytes
        buckets[-1] += names
        room -= num_bytes
    return buckets


def layer_of(name: str) -> str:
    """Return the layer that a parameter is merged with: the adapted layer, or the parameter itself."""
    return name.split(".base_layer.")[0].split(".lora_")[0]


def merge_adapters(model: nn.Module, bucket: Bucket) -> Bucket:
    """Merge every adapted layer of a bucket, W + (alpha / rank) B A, under the base model's own names."""
    merged: Bucket = {}
    for name, weight in bucket.items():
        if ".lora_" in name:
            continue
        plain_name = name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        is_adapted = stem != name
        if is_adapted:
            a = bucket[f"{stem}.lora_A.default.weight"]
            b = bucket[f"{stem}.lora_B.default.weight"]
            layer = model.get_submodule(stem)
            scaling: float = layer.scaling["default"]  # type: ignore[index]
            change = scaling * b.float() @ a.float()
            if layer.fan_in_fan_out:  # the weight is (in, out), as in GPT-2
                change = change.T
            # In float32: in bfloat16 a small change of a large weight would be rounded away.
            weight = (weight.float() + change).to(weight.dtype)
        merged[plain_name] = weight
    return merged


class FullWeights:
    """Full weights of a model in training, of any ZeRO stage, with adapters or without."""

    def __init__(
        self,
        engine: zero.Engine,
        model: "PreTrainedModel | PeftModel",
        *,
        max_bytes: int = MAX_BUCKET_BYTES,
    ):
        from peft import PeftModel

        self._engine = engine
        self.adapted = model if isinstance(model, PeftModel) else None
        """The model with its adapters, if it has any."""
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
        """The transformers model, whose names the weights have."""
        # A tied head comes once, as the embedding. vLLM's classes of some families know no other name of it.
        self._parameters = dict(model.named_parameters())
        described = {name: zero.described(parameter) for name, parameter in self._parameters.items()}
        sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in described.items()}
        self._buckets = split_into_buckets(sizes, max_bytes)

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._buckets)

    def gather(self, device: torch.device | str = "cpu") -> Iterator[Bucket]:
        """Yield each bucket on rank 0, and empty ones elsewhere. Every rank must go through all of them."""
        for names in self._buckets:
            parameters = {name: self._parameters[name] for name in names}
            # Yielded without a name of its own here, which would keep it in memory while the next one is gathered.
            yield self._merged(zero.gather(self._engine, parameters, device))

    def gather_adapter(self) -> Bucket:
        """Copy the weights of the adapters alone, under their names in memory, to rank 0; empty elsewhere.

        All ranks take part.
        """
        adapter: Bucket = {}
        for names in self._buckets:
            parameters = {name: self._parameters[name] for name in names if ".lora_" in name}
            if parameters:
                adapter |= zero.gather(self._engine, parameters)
        return adapter

    def sums(self, device: torch.device | str = "cpu") -> Sums:
        """Return the sums of the weights on rank 0, and none elsewhere. All ranks take part; it gathers all buckets."""
        found: list[tuple[str, TensorSums]] = []
        for bucket in self.gather(device):
            found += named_sums(bucket)
        return grouped(found)

    def describe(self) -> Iterator[Bucket]:
        """Yield the buckets with names, shapes and types only: no memory is used, and no other rank is needed."""
        for names in self._buckets:
            empty: Bucket = {}
            for name in names:
                shape, dtype = zero.described(self._parameters[name])
                empty[name] = torch.empty(shape, dtype=dtype, device="meta")
            yield self._merged(empty)

    def in_checkpoint_format(self, bucket: Bucket) -> Bucket:
        """Return a bucket under the names and shapes of model files, which are those that engines load.

        A model in memory can differ from its files: transformers joins some weights when it loads them.
        """
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.base, bucket)

    def _merged(self, bucket: Bucket) -> Bucket:
        return bucket if self.adapted is None else merge_adapters(self.adapted, bucket)
