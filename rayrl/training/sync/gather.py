"""A model's full weights, a bucket at a time, as a checkpoint has them: adapters merged, nothing sharded.

No rank ever holds the whole of a model that is trained in shards: what is gathered goes out, to a file or to the
replicas, before the next bucket comes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayrl.training import deepspeed_engine as zero

MAX_BUCKET_BYTES = 256 << 20


def split_into_buckets(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, in buckets of at most `max_bytes`; only a layer that is larger alone makes a larger one.

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
    """What a parameter is merged with: the layer that is adapted, or itself."""
    return name.split(".base_layer.")[0].split(".lora_")[0]


def merge_adapters(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha / rank) B A for every adapted layer of a bucket, under the base model's own names."""
    prefix = "base_model.model."
    merged = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix(prefix).replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"]
            layer: nn.Module = model.get_submodule(stem)
            weight = (weight.float() + layer.scaling["default"] * b.float() @ a.float()).to(weight.dtype)  # type: ignore[index, operator]
        merged[plain] = weight
    return merged


class Weights:
    """The weights of a model in training, of any ZeRO stage, with adapters or without."""

    def __init__(self, engine: Any, model: Any, *, max_bytes: int = MAX_BUCKET_BYTES):
        from peft import PeftModel

        self._engine = engine
        self._model = model
        self._adapted = isinstance(model, PeftModel)
        self.base: Any = model.get_base_model() if self._adapted else model
        """The transformers model, whose names the weights have."""
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        sizes = {name: zero.full_shape(p).numel() * p.element_size() for name, p in self._parameters.items()}
        self._buckets = split_into_buckets(sizes, max_bytes)

    def __len__(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    def gathered(self, device: Any = "cpu") -> Iterator[dict[str, Tensor]]:
        """Copies of each bucket's weights by name on rank 0, empty elsewhere. Every rank must go through all of it."""
        for names in self._buckets:
            of = {name: self._parameters[name] for name in names}
            yield self._merged(zero.gathered(self._engine, of, device))  # by no name here: the next needs the room

    def empty(self) -> Iterator[dict[str, Tensor]]:
        """What `gathered` gives on rank 0, without memory and without the other ranks: names, shapes and types."""
        for names in self._buckets:
            of = {name: self._parameters[name] for name in names}
            yield self._merged(
                {name: torch.empty(zero.full_shape(p), dtype=p.dtype, device="meta") for name, p in of.items()}
            )

    def published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A bucket under the names of published checkpoints, which are those that engines load."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.base, state)

    def _merged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_adapters(self._model, state) if self._adapted else state
