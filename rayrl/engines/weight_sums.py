"""Checksums of weights: a trainer's beside an engine's, which holds the same numbers in other tensors.

Engines join weights (q, k and v; gate and up; all experts), split them over tensor-parallel ranks, transpose and pad
them with zeros. The sum and the sum of absolute values, both in float64, survive all of this. They are kept for each
decoder layer as a whole, and for each tensor outside of the layers, so that no rule has to know which names a model
family joins. A step that changes any weight by one unit in the last place of bfloat16 changes them by far more than
float64 rounds (`ROUNDING`).

What equal sums do not show: the order of the weights inside a layer. A transposed or permuted weight has the same sums;
it would come from the loader of the model family and not from a missed update, and the log-probabilities that are
reported beside the sums (`rayrl.engines.weight_folder.TextReading`) show it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

TensorSums = tuple[float, float]
"""Sum and sum of absolute values."""
Sums = dict[str, TensorSums]
"""By group: `layer N`, or the name of a tensor outside of the layers."""

ROUNDING = 1e-12
"""Largest difference of equal sums, as a share of the sum of absolute values: they are added up in another order."""
INDEX_FILE = "model.safetensors.index.json"
_CPU_CHUNK = 1 << 17
"""Numbers that are widened to float64 at once: they fit in a core's cache."""
_GPU_CHUNK = 1 << 24

_LAYER = re.compile(r"\.(\d+)\.")
_NO_WEIGHT = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Constants in old model files, which neither transformers nor vLLM loads."""


def tensor_sums(tensor: Tensor) -> TensorSums:
    """Return the sum and the sum of absolute values of a tensor of any shape, added up in float64."""
    flat = tensor.detach().reshape(-1)
    totals = torch.zeros(2, dtype=torch.float64, device=flat.device)
    for chunk in flat.split(_CPU_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK):
        wide = chunk.double()
        totals += torch.stack([wide.sum(), wide.abs_().sum()])
    total, absolute = totals.tolist()
    return total, absolute


def group_of(name: str) -> str:
    """Return the group of a weight: its layer, the first number in its name, or the weight alone."""
    layer = _LAYER.search(f".{name}")
    return f"layer {layer[1]}" if layer else name


def grouped(sums: Iterable[tuple[str, TensorSums]]) -> Sums:
    """Add up the sums of named weights by group."""
    groups: Sums = {}
    for name, (total, absolute) in sums:
        group = group_of(name)
        total_before, absolute_before = groups.get(group, (0.0, 0.0))
        groups[group] = total_before + total, absolute_before + absolute
    return groups


def named_sums(weights: Mapping[str, Tensor]) -> list[tuple[str, TensorSums]]:
    """Return the sums of each weight. Add up those of all buckets by `grouped`: a layer may lie in several of them."""
    return [(name, tensor_sums(weight)) for name, weight in weights.items()]


def joined(ranks: Sequence[Mapping[str, Sequence[float]]]) -> Sums:
    """Join the sums of an engine's ranks by group.

    A weight that is split over ranks is the sum of its parts. One that is equal on all ranks that have it is a copy on
    each of them (a norm, the bias of a row-parallel layer) and counts once.

    Args:
        ranks: of each rank, the two sums of each of its parameters by name. Pipeline ranks have other names.
    """
    whole: list[tuple[str, TensorSums]] = []
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [tuple(rank[name]) for rank in ranks if name in rank]
        if all(part == parts[0] for part in parts):
            parts = parts[:1]
        whole.append((name, (sum(part[0] for part in parts), sum(part[1] for part in parts))))
    return grouped(whole)


def difference(served: Sums, expected: Sums) -> str | None:
    """Describe the first group in which an engine's weights are not the expected ones; None if there is none.

    A layer must be equal to the layer of the same number, and no layer may be missing. A weight outside of the layers
    must be equal to any of those that are expected there: families rename them, an output head tied to the embedding
    has no name of its own in a file, and an embedding engine has none at all.
    """
    outside = {group: sums for group, sums in expected.items() if not _is_layer(group)}
    for group, sums in served.items():
        candidates = {name: expected[name] for name in [group] if name in expected} if _is_layer(group) else outside
        if not any(_are_equal(sums, candidate) for candidate in candidates.values()):
            there = ", ".join(f"{name} to {_shown(candidate)}" for name, candidate in candidates.items())
            return (
                f"{group} sums to {_shown(sums)} in the engine, and in the trainer {there or 'there is no such layer'}"
            )
    missing = [group for group in expected if _is_layer(group) and group not in served]
    return f"{missing[0]} of the trainer is not in the engine" if missing else None


def folder_sums(folder: Path, dtype: str) -> Sums:
    """Return the sums of a model folder's safetensors weights, as an engine of this dtype serves them."""
    from safetensors import safe_open

    engine_dtype: torch.dtype = getattr(torch, dtype)
    sums: list[tuple[str, TensorSums]] = []
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                if not _NO_WEIGHT.search(name):
                    weight = opened.get_tensor(name)
                    is_wider = weight.is_floating_point() and weight.dtype.itemsize > engine_dtype.itemsize
                    sums.append((name, tensor_sums(weight.to(engine_dtype) if is_wider else weight)))
    return grouped(sums)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a folder's weights: those of its index, or else all safetensors files."""
    index = folder / INDEX_FILE
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _is_layer(group: str) -> bool:
    return group.startswith("layer ")


def _are_equal(ours: TensorSums, theirs: TensorSums) -> bool:
    bound = ROUNDING * theirs[1]
    return all(abs(one - other) <= bound for one, other in zip(ours, theirs, strict=True))  # false for NaN


def _shown(sums: TensorSums) -> str:
    return f"({sums[0]:.15g}, {sums[1]:.15g})"
