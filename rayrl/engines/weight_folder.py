"""Weight folders as vLLM reloads them: complete, and on this machine.

Also the record that a trainer writes beside the weights: their sums, with which a replica compares what it serves
before it answers. Writing these folders is the trainer's work (`rayrl.training.sync`).
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import NotRequired, TypedDict, final

from rayrl.engines.weight_sums import Sums, folder_sums
from rayrl.records import Checkpoint
from rayrl.runs.storage import exists, is_local, join, local_folder

RECORD_FILE = "weight_sums.json"
FOLDER_TIMEOUT_S = 300.0
"""Longest wait for a folder that a trainer is still writing."""
POLL_S = 0.2


@final
class TextReading(TypedDict):
    """Natural text as the trainer reads it. How far a replica is from it is reported, and stops nothing.

    Kernels differ in their rounding, in bfloat16 by more than a training step moves the model.
    """

    token_ids: list[int]
    logprobs: NotRequired[list[float]]
    """Of a policy: log-probability of each token after the first, given those before it, nats."""
    value: NotRequired[float]
    """Of a scalar evaluator or reward model: the head's value of the text."""


@final
class WeightRecord(TypedDict):
    """Record of the trainer beside the weights."""

    dtype: str
    """Of the weights as they were in the trainer."""
    sums: Sums
    """Of the weights in the trainer's memory, see `rayrl.engines.weight_sums`."""
    text: TextReading | None
    """None in a folder for replicas that PPO keeps in step: its rollouts give the same figure."""


def read_record(folder: Path) -> WeightRecord | None:
    """Read the trainer's record; None for a folder that no training of this package has written."""
    file = folder / RECORD_FILE
    return json.loads(file.read_text()) if file.exists() else None


def expected_sums(folder: Path, dtype: str) -> Sums:
    """Return the sums that an engine must show which serves the folder's weights in this dtype.

    They are the trainer's, or for a ready-made model, or one in another dtype, those of the files.
    """
    record = read_record(folder)
    if record is not None and record["dtype"] == dtype:
        return record["sums"]
    return folder_sums(folder, dtype)


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
    # trainer writes the record last.
    last_file = path if is_local(path) else join(path, RECORD_FILE)
    deadline = time.monotonic() + FOLDER_TIMEOUT_S
    while not exists(last_file) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


def weights_folder(checkpoint: Checkpoint) -> str:
    """Return a local folder with the checkpoint's weights, fetched if necessary.

    vLLM's reload of a hub id always takes the newest revision
    (vllm/model_executor/model_loader/reload/inplace.py clears it), so a hub id is resolved to its snapshot.
    """
    if not is_hub_id(checkpoint.path):
        return local_folder(checkpoint.path)
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", "*.json"]
    return snapshot_download(checkpoint.path, revision=checkpoint.revision, allow_patterns=weights)
