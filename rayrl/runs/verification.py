"""Verification of a run: every file of its finished stages, read and compared with the stages' manifests."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rayrl.config import RunConfig
from rayrl.errors import DataError
from rayrl.runs import storage
from rayrl.runs.damage import Files, damage
from rayrl.runs.run import MANIFEST, round_folder, unfinish
from rayrl.runs.stage_table import STAGES

PAYING = {stage.name: stage.pays for stage in STAGES}


@dataclass(frozen=True, kw_only=True)
class DamagedStage:
    """A finished stage some of whose files are not as they were."""

    name: str
    folder: str
    wrong: dict[str, str]
    """What is wrong, by the path in the folder."""


@dataclass(kw_only=True)
class Verified:
    """What was read, and what is damaged."""

    num_stages: int = 0
    num_files: int = 0
    damaged: list[DamagedStage] = field(default_factory=list)


def damaged_stages(url: str, config: RunConfig) -> Verified:
    """Read every file of the finished stages of the run in a folder, all rounds, and find those that are damaged."""
    verified = Verified()
    for folder, name in _finished_stages(url, config):
        try:
            files: Files = storage.read_json(storage.join(folder, MANIFEST)).get("files", {})
            wrong = damage(folder, files, thorough=True)
        except (ValueError, TypeError, AttributeError, DataError) as error:
            files, wrong = {}, {MANIFEST: f"cannot be read ({str(error).splitlines()[0]})"}
        verified.num_stages += 1
        verified.num_files += len(files)
        if wrong:
            verified.damaged.append(DamagedStage(name=name, folder=folder, wrong=wrong))
    return verified


def _finished_stages(url: str, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of every stage that has a manifest, the members of ensembles among them."""
    for number in range(1, config.rounds + 1):
        stages = storage.join(round_folder(url, number), "stages")
        for name in storage.children(stages):
            folder = storage.join(stages, name)
            if storage.exists(storage.join(folder, MANIFEST)):
                yield folder, name


def what_is_lost(stage: DamagedStage) -> str:
    """Say what the run's command does about a damaged stage, once it is repaired."""
    if PAYING.get(stage.name):
        return f"{stage.name}: made again from the answers in the ledger, which are not paid again"
    return f"{stage.name}: made again; whole parts of its tables are kept, and a model is trained anew"


def repair_stage(stage: DamagedStage) -> None:
    """Remove what is damaged, and the stage's manifest: the same command makes it again."""
    unfinish(stage.folder, stage.wrong)
