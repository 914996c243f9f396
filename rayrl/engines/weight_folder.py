"""Weight folders as vLLM reloads them: complete, on this machine, and with every name that vLLM looks for.

Also the format of the probe: a prompt and the trainer's answer to it, written beside the weights, against which a
replica proves that it loaded them correctly. Writing these folders is the trainer's work (`rayrl.training.sync`).
"""

import asyncio
import os
import time
from pathlib import Path
from typing import TypedDict, final

from rayrl.records import Checkpoint
from rayrl.runs.storage import exists, is_local, join, local_folder

PROBE_FILE = "probe.json"
FOLDER_TIMEOUT_S = 300.0
"""Longest wait for a folder that a trainer is still writing."""
POLL_S = 0.2


@final
class PolicyProbe(TypedDict):
    """Probe of a policy's weights."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """Candidates for the next token."""
    logprobs: list[float]
    """Log-probability of each candidate after the prompt, nats."""
    embedding: dict[str, list[float]]
    """By kind of pooling, the first coordinates of the prompt's pooled vector."""


@final
class ValueProbe(TypedDict):
    """Probe of a scalar evaluator's or reward model's weights."""

    prompt_token_ids: list[int]
    value: float
    """The head's value of the prompt."""


Probe = PolicyProbe | ValueProbe


def is_hub_id(path: str) -> bool:
    """Tell a hub id from a folder's path or URL; a relative path counts as a folder if it is there."""
    return "://" not in path and not os.path.isabs(path) and not os.path.isdir(path)


async def wait_for_folder(path: str) -> None:
    """Wait until a trainer has written the folder, at most `FOLDER_TIMEOUT_S`; return at once for a hub id.

    With direct weight transfer the folder is written only for replicas that restart, while the other replicas already
    answer. Such a replica may look for it too early. If it never appears, the load that follows fails with its path.
    """
    if is_hub_id(path):
        return
    # A local folder is renamed into place when it is complete. On an object store files appear one by one, and the
    # trainer writes the probe last.
    last_file = path if is_local(path) else join(path, PROBE_FILE)
    deadline = time.monotonic() + FOLDER_TIMEOUT_S
    while not exists(last_file) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


def weights_folder(checkpoint: Checkpoint) -> str:
    """Return a local folder with the checkpoint's weights, fetched if necessary; a hub id without revision as it is.

    vLLM's reload of a hub id always takes the newest revision
    (vllm/model_executor/model_loader/reload/inplace.py clears it), so a pinned revision is resolved to its snapshot.
    """
    if checkpoint.revision is None or not is_hub_id(checkpoint.path):
        return local_folder(checkpoint.path)
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", "*.json"]
    return snapshot_download(checkpoint.path, revision=checkpoint.revision, allow_patterns=weights)


def with_tied_head(folder: Path, scratch: Path) -> Path:
    """Return the folder, or one of links in `scratch` that also holds the tied output head under its own name.

    vLLM on CPU keeps a packed copy of a tied head, and a reload renews the copy only from a weight of that name.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    embedding = None
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if "lm_head.weight" in names:
                return folder
            if "model.embed_tokens.weight" in names:
                embedding = opened.get_tensor("model.embed_tokens.weight")
    if embedding is None:
        return folder
    for file in folder.iterdir():
        # An index lists the weights' files, and vLLM would skip the file added below, which is not in the list.
        if not file.name.endswith(".index.json"):
            (scratch / file.name).symlink_to(file.resolve())
    save_file({"lm_head.weight": embedding}, scratch / "tied-head.safetensors")
    return scratch
