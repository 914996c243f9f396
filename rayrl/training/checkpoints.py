"""A fit's checkpoints on its storage: which of them are whole, and which files have changed since they were written.

Every rank writes its own part and a list of it: names, sizes, checksums. A checkpoint is whole if the lists of all
ranks are there and every file has its size; before it is loaded, it is read and compared with the checksums. So neither
an upload that a full disk cut off nor a damaged file is taken for a checkpoint, and the one before it counts.
"""

import contextlib
import json
import logging
import re
import zlib
from pathlib import Path

from rayrl.runs import storage

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a fit's checkpoints."""
PREFIX = "checkpoint_"
NOTE = "damaged-"
NUM_KEPT = 2
"""The last checkpoint, and the one before it for when the last is damaged."""
_CHUNK = 1 << 24
_LIST = re.compile(r"rank-(\d+)-of-(\d+)\.json")


def seal(folder: str, step: int, rank: int, world_size: int) -> None:
    """Add this rank's list to its part of a checkpoint."""
    files = {
        file.relative_to(folder).as_posix(): [file.stat().st_size, _checksum(file)]
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    }
    content = json.dumps({"step": step, "files": files})
    (Path(folder) / f"rank-{rank}-of-{world_size}.json").write_text(content)


def damaged(folder: str, rank: int, world_size: int) -> list[str]:
    """Files of this rank's part that are not what it wrote."""
    files = json.loads((Path(folder) / f"rank-{rank}-of-{world_size}.json").read_text())["files"]
    return [name for name, (_, checksum) in files.items() if _checksum(Path(folder) / name) != checksum]


def whole(fit_url: str) -> list[str]:
    """Names of the whole checkpoints, the newest first."""
    steps = {name: _step(storage.join(fit_url, name)) for name in _folders(fit_url)}
    return sorted((name for name, step in steps.items() if step is not None), key=lambda n: (steps[n], n), reverse=True)


def tidy(fit_url: str) -> None:
    """Make the folder one that Ray Train continues from; nobody may be writing to it.

    What a cut-off upload has left is removed, for the room it takes. Ray Train's list is removed if it is damaged or
    names what is gone: the fit's workers look at the folders themselves.
    """
    present, usable, listed = set(_folders(fit_url)), whole(fit_url), _listed(fit_url)
    if listed is None or not listed <= present:
        logger.warning("%s: Ray Train's list of checkpoints is damaged; going on from the folders", fit_url)
        storage.remove(storage.join(fit_url, SNAPSHOT))
        listed = set()
    for name in sorted(present - listed - set(usable[:NUM_KEPT])):
        logger.info("%s is removed: not a whole checkpoint, or an old one", storage.join(fit_url, name))
        storage.remove_folder(storage.join(fit_url, name))
    for name in sorted((present & listed) - set(usable)):
        note(fit_url, name, ["files are missing or cut off"])


def note(fit_url: str, name: str, files: list[str]) -> None:
    """Leave word for the driver that a checkpoint is damaged: what workers log reaches nobody."""
    storage.write_json(storage.join(fit_url, f"{NOTE}{name}.json"), {"checkpoint": name, "files": files})


def tell(fit_url: str) -> None:
    """Log what the workers have left word of, once, and remove it; the fit must be over.

    Ray Train's list, which names it, goes too: the next fit looks at the folders.
    """
    for file in storage.children(fit_url):
        if file.startswith(NOTE):
            url = storage.join(fit_url, file)
            found = storage.read_json(url)
            damaged_url = storage.join(fit_url, found["checkpoint"])
            logger.warning(
                "%s is damaged (%s); the fit went on from the checkpoint before it, and this one is removed",
                damaged_url,
                ", ".join(found["files"]),
            )
            storage.remove(storage.join(fit_url, SNAPSHOT))
            storage.remove_folder(damaged_url)
            storage.remove(url)


def _folders(fit_url: str) -> list[str]:
    return [name for name in storage.children(fit_url) if name.startswith(PREFIX) and name != SNAPSHOT]


def _step(url: str) -> int | None:
    """The optimizer step of a checkpoint; None if it is not whole."""
    sizes = storage.sizes(url)
    lists = {name: found for name in sizes if (found := _LIST.fullmatch(name))}
    ranks = {int(found[1]) for found in lists.values()}
    if not lists or any(ranks != set(range(int(found[2]))) for found in lists.values()):
        return None
    steps = set()
    for name in lists:
        try:
            of_rank = storage.read_json(storage.join(url, name))
        except ValueError:
            return None
        if any(sizes.get(file) != size for file, (size, _) in of_rank["files"].items()):
            return None
        steps.add(of_rank["step"])
    return max(steps) if len(steps) == 1 else None


def _listed(fit_url: str) -> set[str] | None:
    """Names in Ray Train's list; empty if there is none yet, None if it cannot be read."""
    url = storage.join(fit_url, SNAPSHOT)
    if not storage.exists(url):
        return set()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return {result["checkpoint_dir_name"] for result in storage.read_json(url)["checkpoint_results"]}
    return None


def _checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
