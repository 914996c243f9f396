"""A folder of weights as vLLM reloads it: there, and with every name it looks for."""

import asyncio
import os
import time
from pathlib import Path

from rayrl.runs.storage import exists, is_local, join

PROBE_FILE = "probe.json"
FOLDER_TIMEOUT_S = 300.0
POLL_S = 0.2


async def until_there(path: str) -> None:
    """Wait, for some time, for a folder that the trainer writes while the replicas that did not restart answer already.

    A local folder appears whole; of a remote one the probe is written last. A hub id is there.
    """
    if "://" not in path and not os.path.isabs(path):
        return
    last, deadline = path if is_local(path) else join(path, PROBE_FILE), time.monotonic() + FOLDER_TIMEOUT_S
    while not exists(last) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


def with_tied_head(folder: Path, scratch: Path) -> Path:
    """The folder, or one of links in `scratch` that also names the tied output head.

    vLLM on CPU keeps a packed copy of a tied head; a reload renews it only from a weight of its own name.
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
        if not file.name.endswith(".index.json"):  # it would hide the file added here
            (scratch / file.name).symlink_to(file.resolve())
    save_file({"lm_head.weight": embedding}, scratch / "tied-head.safetensors")
    return scratch
