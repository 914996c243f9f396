"""Weights of a model folder, read from the headers of its safetensors: whether they are whole, and all there.

A safetensors file starts with 8 bytes, the length of its header; the header is JSON with the name, shape and place of
every tensor, and the tensors follow. Half a download, a pointer of Git LFS, a missing shard and a missing layer
show there, and no weight is read. Tensors that are missing must be refused: transformers draws them at random.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from rayrl.data.files import GIT_LFS
from rayrl.errors import ConfigError
from rayrl.runs import storage

WHOLE = "model.safetensors"
"""File of a model that is in one."""
INDEX = "model.safetensors.index.json"
"""File that tells which shard has which tensor."""
_MAX_HEADER_BYTES = 100_000_000
"""Of safetensors itself."""
_SHOWN = 3
"""Names in a message."""
_LAYER = re.compile(r"(?P<stack>.*?(?:^|\.)(?:layers|layer|h|blocks|block))\.(?P<number>\d+)\.(?P<name>.+)")
_OTHER_MODALITIES = re.compile(r"vis|image|audio|speech|video", re.IGNORECASE)

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors of a model, by their names in the files."""

    num_bytes: int
    """Of all files."""
    shapes: Mapping[str, Shape]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def layers(self) -> dict[int, dict[str, Shape]]:
        """Tensors of the language model's layers, by the layer's number; empty where layers are named otherwise."""
        stacks: dict[str, dict[int, dict[str, Shape]]] = {}
        for name, shape in self.shapes.items():
            found = _LAYER.fullmatch(name)
            if found is not None and not _OTHER_MODALITIES.search(found["stack"]):
                layers = stacks.setdefault(found["stack"], {})
                layers.setdefault(int(found["number"]), {})[found["name"]] = shape
        return max(stacks.values(), key=len, default={})

    @property
    def linear_names(self) -> list[str]:
        """Names of the linear layers, as they are called in every layer; experts of a mixture are none."""
        names = {
            tensor.removesuffix(".weight").rpartition(".")[2]
            for layer in self.layers.values()
            for tensor, shape in layer.items()
            if tensor.endswith(".weight") and len(shape) == 2 and "experts." not in tensor
        }
        return sorted(names)


def read_weights(folder: str, path: str, *, may_come: bool = False) -> Weights | None:
    """Read the headers of a folder's weights; None where they are still to be downloaded.

    Args:
        folder: of the model.
        path: the policy's, for messages.
        may_come: the folder is the cached part of a hub model, and a run may still download the rest.

    Raises:
        ConfigError: weights that are missing, cut off, damaged, or no safetensors.
    """
    fs, root = storage.locate(folder)
    sizes: dict[str, int] = {file["name"].rpartition("/")[2]: file["size"] for file in fs.ls(root, detail=True)}
    names = _file_names(folder, path, sizes, may_come=may_come)
    if names is None:
        return None
    missing = [name for name in names if name not in sizes]
    if missing and may_come:
        return None
    if missing:
        raise ConfigError(
            f"policy.path must hold all of its weights, got {path}, in which {_some(missing)} of {INDEX} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download it again (hf download, or git lfs pull)"
        )
    shapes: dict[str, Shape] = {}
    for name in names:
        shapes |= _read_header(storage.join(folder, name), sizes[name])
    if not shapes:
        raise ConfigError(f"policy.path must hold weights, got {path}, whose {names[0]} has no tensor; save it again")
    return Weights(num_bytes=sum(sizes[name] for name in names), shapes=shapes)


def _file_names(folder: str, path: str, sizes: Mapping[str, int], *, may_come: bool) -> list[str] | None:
    """List the files of a model's weights, there or not; None where all are still to be downloaded.

    Raises:
        ConfigError: there are none that can be loaded.
    """
    if WHOLE in sizes:  # as in transformers, one whole file goes before an index
        return [WHOLE]
    if INDEX in sizes:
        shard_of = read_json_file(storage.join(folder, INDEX)).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of:
            raise ConfigError(
                f"policy.path: {path}/{INDEX} must tell the file of each tensor (weight_map), and does not"
            )
        return sorted(set(cast(dict[str, str], shard_of).values()))
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in sizes):
        raise ConfigError(
            f"policy.path must hold {INDEX} beside its shards, got {path}, in which it is missing; download it too"
        )
    if not may_come or any(name.endswith((".bin", ".pt", ".pth")) for name in sizes):
        raise ConfigError(
            f"policy.path must hold weights as {WHOLE}, or in shards with {INDEX}, got {path}, which has none; convert "
            "them with save_pretrained (pickled weights can run code, and are never loaded)"
        )
    return None


def _read_header(url: str, size: int) -> dict[str, Shape]:
    """Read the shapes of the tensors in a safetensors file.

    Raises:
        ConfigError: it is a pointer, cut off, or no safetensors file.
    """
    fs, path = storage.locate(url)
    with fs.open(path, "rb") as file:
        start = cast(bytes, file.read(8))
        if GIT_LFS.startswith(start) and start:
            raise ConfigError(
                f"policy.path: {url} must be the weights, and is a pointer of Git LFS ({size} bytes); get them with "
                "git lfs pull in that folder, or with hf download"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or (length + 8 > size and length <= _MAX_HEADER_BYTES):
            raise ConfigError(_cut(url, size))
        text = cast(bytes, file.read(length)) if length <= _MAX_HEADER_BYTES else b""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(text)
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ConfigError(
            f"policy.path: {url} must be a safetensors file, and its header cannot be read: it is damaged or "
            "encrypted; download it again"
        ) from None
    if end > size:
        raise ConfigError(_cut(url, size, end))
    if end < size:
        raise ConfigError(
            f"policy.path: {url} must have {end:,} bytes by its header, and has {size:,}; download it again"
        )
    return shapes


def _cut(url: str, size: int, end: int | None = None) -> str:
    whole = "" if end is None else f" of {end:,}"
    return f"policy.path: {url} must be whole, and is cut off: it has {size:,} bytes{whole}; download it again"


def read_json_file(url: str, setting: str = "policy.path") -> dict[str, Any]:
    """Read a table from one of a model's JSON files.

    Raises:
        ConfigError: it holds something else.
    """
    content = storage.read_bytes(url)
    if content.startswith(GIT_LFS):
        raise ConfigError(f"{setting}: {url} must be JSON, and is a pointer of Git LFS; get the file: git lfs pull")
    try:
        table = json.loads(content)
    except ValueError as error:
        raise ConfigError(
            f"{setting}: {url} must be JSON, and is not ({error}): it is damaged; download it again"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{setting}: {url} must be a table in JSON, in {{}}, and is not; download it again")
    return cast(dict[str, Any], table)


def check_complete(weights: Weights, config: Mapping[str, Any], path: str) -> None:
    """Refuse weights that lack a layer, a part of a layer, the embedding or the head, or are of another size.

    Names differ between families, and so the layers are compared with each other, and the embedding is found by its
    shape.

    Args:
        weights: of the model.
        config: its config.json, of the language model.
        path: the policy's, for messages.

    Raises:
        ConfigError: names what is missing.
    """
    remedy = "take the whole model: transformers would draw what is missing at random"
    num_layers = config.get("num_hidden_layers") or config.get("n_layer")
    layers = weights.layers
    if layers and num_layers:
        missing = [str(number) for number in range(num_layers) if number not in layers]
        if missing:
            raise ConfigError(
                f"policy.path must hold all {num_layers} layers that its config.json names, got {path}, whose weights "
                f"lack layer {_some(missing)}; {remedy}"
            )
        number, names = _incomplete_layer({n: set(layers[n]) for n in range(num_layers)}, config)
        if names:
            raise ConfigError(
                f"policy.path must hold the whole of each layer, got {path}, whose layer {number} lacks {_some(names)}"
                f", which its other layers have; {remedy}"
            )
    _check_vocabulary(weights, config, path, remedy)


def _incomplete_layer(layers: dict[int, set[str]], config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Find a layer that lacks tensors of another one of its kind, without any of its own; and their names."""
    if config.get("num_kv_shared_layers") or config.get("use_cla"):
        return 0, []  # layers that read the keys and values of another have none of their own
    kinds: list[str] = config.get("layer_types") or []
    for number, names in layers.items():
        for other, wanted in layers.items():
            is_same_kind = not kinds or (max(number, other) < len(kinds) and kinds[number] == kinds[other])
            if is_same_kind and names < wanted:
                return number, sorted(wanted - names)
    return 0, []


def _check_vocabulary(weights: Weights, config: Mapping[str, Any], path: str, remedy: str) -> None:
    """Refuse weights without an embedding of the vocabulary, or without a head where the config wants one apart."""
    vocab_size = config.get("vocab_size")
    if not vocab_size or not weights.layers:
        return
    others = {name: shape for name, shape in weights.shapes.items() if len(shape) == 2 and not _LAYER.fullmatch(name)}
    num_matrices = Counter(shape[0] for shape in others.values())[vocab_size]
    if num_matrices == 0:
        embeddings = {name: shape[0] for name, shape in others.items() if re.search(r"embed|wte", name)}
        if embeddings:
            name, num_rows = next(iter(embeddings.items()))
            raise ConfigError(
                f"policy.path must have an embedding for each of the {vocab_size:,} tokens of its config.json "
                f"(vocab_size), got {path}, whose {name} has {num_rows:,} rows; save model and config together"
            )
        raise ConfigError(f"policy.path must hold the embedding of its tokens, got {path}, which lacks it; {remedy}")
    if num_matrices == 1 and config.get("tie_word_embeddings") is False:
        raise ConfigError(
            f"policy.path must hold an output head beside the embedding (tie_word_embeddings is false in its "
            f"config.json), got {path}, which has one of them; {remedy}"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
