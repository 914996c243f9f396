"""Content of a run's inputs: a digest of each file, model, function and judge prompt that its config names.

A path says where an input is, and not what it is. With the digests of its inputs in a stage's key, an edited file is
other work, wherever it is looked for: in the run itself, in a half-done training, and in the run named by `reuse`.

Local files are read whole, once (`rayrl.runs.machine_cache`). Of remote ones the store's own mark counts (ETag,
checksum, generation, or size and time), and of the hub's the commit. What cannot be found out, for lack of a network,
is taken to be as it was.
"""

# fsspec and huggingface_hub are untyped in parts.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrl.config import DataConfig, RunConfig, Table
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.machine_cache import file_digest

logger = logging.getLogger(__name__)

Kind = Literal["data", "model", "function", "text"]

UNREAD_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot"})
"""Files of weights beside safetensors, which rayrl never reads."""
CONTENT_MARKS = ("ETag", "etag", "checksum", "md5Hash", "content_md5", "crc32c")
"""What filesystems tell of a remote file's content."""
WRITE_MARKS = ("generation", "size", "LastModified", "mtime")
"""What they tell of when it was written, where they tell nothing of its content."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """Something that a config names, and whose content decides about the run."""

    setting: str
    """Dotted."""
    place: str
    """Path, fsspec URL, hub name, or "module:function"."""
    kind: Kind
    revision: str | None = None
    """Of a model of the hub."""


def inputs_of(config: RunConfig) -> list[Input]:
    """List the inputs of a run."""
    inputs = [Input(setting=setting, place=data.path, kind="data") for setting, data in _data_in(config, "")]
    policy, reward_model, spg = config.policy, config.reward_model, config.refresh.spg
    inputs.append(Input(setting="policy.path", place=policy.path, kind="model", revision=policy.revision))
    if reward_model.path is not None:
        inputs.append(Input(setting="reward_model.path", place=reward_model.path, kind="model"))
    if config.select.embedder != "policy":
        inputs.append(Input(setting="select.embedder", place=config.select.embedder, kind="model"))
    if config.pipeline == "rlp" or config.pseudo_label.synthetic:
        inputs.append(Input(setting="refresh.spg.entailment_model", place=spg.entailment_model, kind="model"))
        if spg.embedder is not None:
            inputs.append(Input(setting="refresh.spg.embedder", place=spg.embedder, kind="model"))
    inputs += [Input(setting=table.setting, place=table.path, kind="data") for table in config.oracle.tables()]
    functions = config.oracle.functions() | (
        {} if config.ppo.function is None else {"ppo.function": config.ppo.function}
    )
    inputs += [Input(setting=setting, place=place, kind="function") for setting, place in functions.items()]
    for name in ("template", "pairwise_template"):
        if (place := getattr(config.rubric, name)) is not None:
            inputs.append(Input(setting=f"rubric.{name}", place=place, kind="text"))
    return inputs


def _data_in(table: Table, prefix: str) -> Iterator[tuple[str, DataConfig]]:
    """Yield the data settings in a table and the tables in it, with their dotted names."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        if isinstance(value, DataConfig):
            yield f"{prefix}{name}.path", value
        elif isinstance(value, Table):
            yield from _data_in(value, f"{prefix}{name}.")


def contents_of(config: RunConfig, known: Mapping[str, str]) -> dict[str, str]:
    """Return the digest of every input's content, by setting.

    Args:
        config: the run.
        known: digests of an earlier start, for inputs of which none can be found out now.
    """
    contents: dict[str, str] = {}
    for each in inputs_of(config):
        digest = content_of(each)
        if digest is None and known.get(each.setting):
            logger.warning(
                "%s %s cannot be compared with the last start's now, and is taken to be as it was", *_of(each)
            )
        contents[each.setting] = digest or known.get(each.setting, "")
    return contents


def _of(each: Input) -> tuple[str, str]:
    return each.setting, each.place


def content_of(each: Input) -> str | None:
    """Return the digest of an input's content; None if it cannot be found out."""
    try:
        if each.kind == "function":
            return _function_content(each.place)
        if each.kind == "model" and not _is_path(each.place):
            return _hub_commit(each.place, "model", each.revision)
        if each.kind == "data" and not _is_path(each.place):
            return _hub_commit(each.place.partition(":")[0], "dataset", None)
        return files_content(each.place, without=UNREAD_WEIGHTS if each.kind == "model" else frozenset())
    except Exception as error:  # of many filesystems; whether an input can be read is not decided here
        logger.debug("the content of %s is not known: %r", each.place, error)
        return None


def files_content(place: str, *, without: frozenset[str] = frozenset()) -> str:
    """Return the digest of a file, of the files of a folder, or of those that a pattern names.

    Args:
        place: path or fsspec URL.
        without: endings of files that do not count. Hidden files never do.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = storage.locate(os.path.expanduser(place))
    if any(sign in path for sign in "*?[") and not fs.exists(path):
        names = sorted(fs.glob(path))
        root = path.rpartition("/")[0]
    elif fs.isdir(path):
        names, root = sorted(fs.find(path)), path
    else:
        names, root = [path], path
    parts: list[str] = []
    for name in map(str, names):
        inside = name.removeprefix(root).lstrip("/")
        if any(part.startswith(".") for part in inside.split("/")) or os.path.splitext(name)[1] in without:
            continue
        parts += [
            inside,
            file_digest(name) if storage.is_local(place) else mark(info := fs.info(name)) or _writing(info),
        ]
    if not parts:
        raise FileNotFoundError(place)
    return content_id(*parts)


def mark(info: Mapping[str, Any]) -> str:
    """Write what a filesystem tells of a file's content; empty if it tells nothing."""
    return " ".join(f"{name}={info[name]}" for name in CONTENT_MARKS if info.get(name) is not None)


def _writing(info: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={info[name]}" for name in WRITE_MARKS if info.get(name) is not None)


def _is_path(place: str) -> bool:
    """Tell a path from a name on the hub as transformers and datasets do: it is a path if it is there."""
    return "://" in place or os.path.exists(os.path.expanduser(place)) or any(sign in place for sign in "*?[")


def _hub_commit(name: str, kind: str, revision: str | None) -> str | None:
    """Return the commit of the hub that is used: this machine's cached one, else the one that would be fetched."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    if kind == "model":
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "refs", revision or "main")
    if reference.exists():
        return reference.read_text().strip()
    if constants.HF_HUB_OFFLINE:
        return None
    return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10.0).sha


def _function_content(place: str) -> str | None:
    """Return the digest of the file that a function is named in, and of the one that defines it if that is another."""
    module_name, _, function_name = place.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.find_spec(module_name)
        files = {spec.origin} if spec is not None else set()
    else:
        defining = sys.modules.get(getattr(getattr(module, function_name, None), "__module__", None) or "")
        files = {getattr(found, "__file__", None) for found in (module, defining)}
    digests = sorted(file_digest(file) for file in files if file is not None and os.path.isfile(file))
    return content_id(*digests) if digests else None


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the settings whose inputs have other content than before; what was not known then has not changed."""
    return [setting for setting, content in now.items() if before.get(setting, content) not in ("", content)]
