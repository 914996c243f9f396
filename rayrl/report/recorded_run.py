"""A run as its directory records it: the resolved config, and the manifest of every stage that has finished.

Works at any time, also while the run goes on, on any fsspec filesystem. Which stages a run has follows from its config
by the stage table; a folder of another stage is not looked at. Nothing here is written, and no table or curve is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from rayrl.config import RunConfig
from rayrl.runs import storage
from rayrl.runs.run import Manifest, read_config, read_manifest, round_folder
from rayrl.runs.stage_metrics import StageMetrics
from rayrl.runs.stage_table import Stage, stages_of

M = TypeVar("M", bound=StageMetrics)


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """Config and manifests of one run."""

    url: str
    config: RunConfig
    manifests: Mapping[tuple[Stage, int], Manifest[StageMetrics] | None]
    """Every stage that the config has, with its round, in order; None where the stage is not finished."""

    def folder(self, number: int) -> str:
        """URL of a round's stages and metrics."""
        return round_folder(self.url, number)

    def stage_folder(self, stage: Stage, number: int, *parts: str) -> str:
        """URL inside a stage's folder."""
        return storage.join(self.folder(number), "stages", stage.name, *parts)

    def curve(self, stage: Stage, number: int) -> str:
        """URL of a training's curve."""
        return storage.join(self.folder(number), "metrics", f"{stage.name}.jsonl")

    def has(self, stage: Stage) -> bool:
        """Return whether the config has this stage, finished or not."""
        return any(stage is planned for planned, _ in self.manifests)

    def rounds(self) -> range:
        """Numbers of the rounds."""
        return range(1, self.config.rounds + 1)

    def metrics(self, stage: Stage[M], number: int = 1) -> M | None:
        """Metrics of a stage in one round; None if it is not finished, or not a stage of this round."""
        manifest = self.manifests.get((stage, number))
        # `read_manifest` has checked them against the stage's own class.
        return None if manifest is None else cast(M, manifest.metrics)

    def last(self, stage: Stage[M]) -> M | None:
        """Metrics of a stage in the last round that has finished it; None if none has."""
        for number in reversed(self.rounds()):
            metrics = self.metrics(stage, number)
            if metrics is not None:
                return metrics
        return None

    def all_rounds(self, stage: Stage[M]) -> list[M]:
        """Metrics of a stage in every round that has finished it, in order."""
        found = (self.metrics(stage, number) for number in self.rounds())
        return [metrics for metrics in found if metrics is not None]


def read_run(run_dir: str) -> RecordedRun:
    """Read the config and the manifests of a run.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: one of its files is damaged, or of another version of rayrl.
    """
    url = storage.absolute(run_dir)
    config = read_config(url)
    manifests = {
        (stage, number): read_manifest(round_folder(url, number), stage) for stage, number in stages_of(config)
    }
    return RecordedRun(url=url, config=config, manifests=manifests)


def title(name: str, number: int) -> str:
    """Name a stage, a policy or a curve of a round for humans: "dpo", "dpo, round 2"."""
    return name if number == 1 else f"{name}, round {number}"
