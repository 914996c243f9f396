"""Checkpoints of a fit on its storage: which are whole, and which files have changed since they were written.

Every rank writes its own part, in a folder of its own beside the checkpoint's, and moves it there when it is complete:
last of all a list of it, with names, sizes and checksums. A checkpoint is whole if the lists of all ranks are there and
every file has its size. Before it is loaded, the ranks compare its files with the checksums; they may be more or fewer
than those that wrote it. An upload that a full disk cut off, or a damaged file, is therefore never taken for a
checkpoint: the one before it counts.

This module reads and tidies folders only. Writing checkpoints through Ray Train is in `rayrl.training.launch`.
"""

import contextlib
import json
import logging
import re
import zlib
from pathlib import Path
from typing import TypedDict

from rayrl.runs import storage

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a fit's checkpoints."""
PREFIX = "checkpoint_"
DAMAGE_PREFIX = "damaged-"
NUM_KEPT = 2
"""The last checkpoint, and the one before it for when the last is damaged."""
_CHUNK_BYTES = 1 << 24
_RANK_LIST = re.compile(r"rank-(\d+)-of-(\d+)\.json")


class RankList(TypedDict):
    """One rank's list of its part of a checkpoint."""

    step: int
    files: dict[str, tuple[int, int]]
    """Size and checksum of each file, by its path in the checkpoint's folder."""


class Damage(TypedDict):
    """A worker's message to the driver about a checkpoint that cannot be used."""

    checkpoint: str
    files: list[str]


def seal(folder: str, step: int, rank: int, world_size: int) -> str:
    """Write this rank's list into the local folder that holds its part of a checkpoint, and return the list's name."""
    files: dict[str, tuple[int, int]] = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = (file.stat().st_size, _checksum(file))
    content: RankList = {"step": step, "files": files}
    file = _rank_list_file(folder, rank, world_size)
    file.write_text(json.dumps(content))
    return file.name


def changed_files(folder: str, rank: int, world_size: int) -> list[str]:
    """Compare this rank's share of a checkpoint's parts with their lists, and return the files that have changed."""
    lists = sorted(file for file in Path(folder).iterdir() if _RANK_LIST.fullmatch(file.name))
    changed: list[str] = []
    for file in lists[rank::world_size]:
        content: RankList = json.loads(file.read_text())
        for name, (_, checksum) in content["files"].items():
            if _checksum(Path(folder) / name) != checksum:
                changed.append(name)
    return changed


def whole(fit_url: str) -> list[str]:
    """Return the names of the whole checkpoints, the newest first.

    The newest is the one of the highest step: clocks of different nodes do not agree.
    """
    steps: dict[str, int] = {}
    for name in _checkpoint_folders(fit_url):
        step = _step_if_whole(storage.join(fit_url, name))
        if step is not None:
            steps[name] = step
    return sorted(steps, key=lambda name: (steps[name], name), reverse=True)


def tidy(fit_url: str) -> None:
    """Make the folder one that Ray Train continues from. No other process may be writing to it.

    The remains of a cut-off upload are removed, for the room they take. Ray Train's list is removed if it is damaged or
    names a missing folder: the fit's workers look at the folders themselves.
    """
    present = set(_checkpoint_folders(fit_url))
    usable = whole(fit_url)
    listed = _listed_by_ray_train(fit_url)
    if listed is None or not listed <= present:
        logger.warning("%s: Ray Train's list of checkpoints is damaged; going on from the folders", fit_url)
        storage.remove(storage.join(fit_url, SNAPSHOT))
        listed = set()
    # Ray Train fails on a listed folder that is missing, so only the others are removed here.
    for name in sorted(present - listed - set(usable[:NUM_KEPT])):
        logger.info("%s is removed: not a whole checkpoint, or an old one", storage.join(fit_url, name))
        storage.remove_folder(storage.join(fit_url, name))
    for name in sorted((present & listed) - set(usable)):
        note_damage(fit_url, name, ["files are missing or cut off"])


def note_damage(fit_url: str, name: str, files: list[str]) -> None:
    """Leave a message for the driver that a checkpoint is damaged: a worker's log does not reach the user."""
    content: Damage = {"checkpoint": name, "files": files}
    storage.write_json(storage.join(fit_url, f"{DAMAGE_PREFIX}{name}.json"), content)


def remove_damaged(fit_url: str) -> None:
    """Log the damage that workers have noted, and remove those checkpoints. The fit must be over.

    Ray Train's list, which names them, is removed too: the next fit looks at the folders.
    """
    for file in storage.children(fit_url):
        if not file.startswith(DAMAGE_PREFIX):
            continue
        note_url = storage.join(fit_url, file)
        damage: Damage = storage.read_json(note_url)
        damaged_url = storage.join(fit_url, damage["checkpoint"])
        logger.warning(
            "%s is damaged (%s); the fit went on from the checkpoint before it, and this one is removed",
            damaged_url,
            ", ".join(damage["files"]),
        )
        storage.remove(storage.join(fit_url, SNAPSHOT))
        storage.remove_folder(damaged_url)
        storage.remove(note_url)


def _checkpoint_folders(fit_url: str) -> list[str]:
    return [name for name in storage.children(fit_url) if name.startswith(PREFIX) and name != SNAPSHOT]


def _step_if_whole(url: str) -> int | None:
    """Return the optimizer step of a checkpoint; None if it is not whole."""
    sizes = storage.sizes(url)
    rank_lists: list[str] = []
    ranks: set[int] = set()
    world_sizes: set[int] = set()
    for name in sizes:
        if found := _RANK_LIST.fullmatch(name):
            rank_lists.append(name)
            ranks.add(int(found[1]))
            world_sizes.add(int(found[2]))
    # Lists of two world sizes, or of some ranks only, are the remains of an upload that was cut off.
    if len(world_sizes) != 1 or ranks != set(range(world_sizes.pop())):
        return None
    steps: set[int] = set()
    for name in rank_lists:
        try:
            content: RankList = storage.read_json(storage.join(url, name))
        except ValueError:  # cut off in the middle
            return None
        for file, (size, _) in content["files"].items():
            if sizes.get(file) != size:
                return None
        steps.add(content["step"])
    return steps.pop() if len(steps) == 1 else None


def _listed_by_ray_train(fit_url: str) -> set[str] | None:
    """Return the names in Ray Train's list; empty if there is none yet, None if it cannot be read."""
    url = storage.join(fit_url, SNAPSHOT)
    if not storage.exists(url):
        return set()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return {result["checkpoint_dir_name"] for result in storage.read_json(url)["checkpoint_results"]}
    return None


def _rank_list_file(folder: str, rank: int, world_size: int) -> Path:
    return Path(folder) / f"rank-{rank}-of-{world_size}.json"


def _checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
