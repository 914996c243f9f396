"""One run on disk: the resolved config, and one manifest per finished stage, written last.

A stage is finished if and only if its manifest is there and carries the key of its inputs. The key is a hash of the
stage's own settings and the keys of what it read, so that another run's stage with the same key (`reuse`) is the same
work.

A later round is a view of the run (`Run.round`): its stages and curves lie in a folder of its own.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rayrl.algorithms.budget import round_share
from rayrl.config import RunConfig, Table
from rayrl.errors import RunDirectoryError
from rayrl.records import content_id
from rayrl.runs import storage

logger = logging.getLogger(__name__)

PAID_STAGES = ("query", "preferences")
"""Their manifests say how many label queries a round has paid for (`num_spent`)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished stage leaves behind, beside its table or checkpoint."""

    stage: str
    key: str
    seconds: float
    num_rows: int
    metrics: dict[str, Any]
    summary: str
    finished_at: str


@dataclass(kw_only=True)
class Run:
    """A run directory and the config it belongs to; or a view of one of its rounds."""

    config: RunConfig
    url: str
    timings: list[dict[str, Any]] = field(default_factory=list)
    home: str | None = None
    """Folder of the whole run, where this is a view of a later round."""

    def rounds(self) -> Iterator["Run"]:
        """The rounds in order, each made when the one before it is over: it spends what that has left."""
        return (self.round(number) for number in range(1, self.config.rounds + 1))

    def round(self, number: int) -> "Run":
        """The run as the stages of a round see it, with a share of `select.budget` for their own.

        Round 1 is the run itself. A later one has a folder and a seed of its own, so that it draws anew. What the
        rounds before have spent is read from their manifests, not from the ledger: an interrupted round gets the same
        share again.
        """
        config = self.config
        spent = sum(_num_spent(round_folder(self.url, earlier)) for earlier in range(1, number))
        share = round_share(config.select.budget, spent, config.rounds - number + 1)
        changed: dict[str, Any] = {"select": config.select.model_copy(update={"budget": share})}
        if number == 1:
            return replace(self, config=config.model_copy(update=changed))
        changed["seed"] = int(content_id("round", str(config.seed), str(number)), 16) >> 1
        if config.reuse is not None:
            changed["reuse"] = round_folder(storage.absolute(config.reuse), number)
        folder = round_folder(self.url, number)
        return replace(self, config=config.model_copy(update=changed), url=folder, home=self.url)

    def folder(self, stage: str, *parts: str) -> str:
        """URL inside a stage's folder."""
        return storage.join(self.url, "stages", stage, *parts)

    def stages(self) -> set[str]:
        """Stages that have a manifest."""
        names = ("pool", "sft", "generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate")
        names += ("preferences", "fit_reward_model", "ppo", "samples", "synthesize", "importance")
        names += ("refit_reward_model", "ppo_refreshed", "track_rewards", "audit_pairs")
        return {name for name in names if storage.exists(self.folder(name, "manifest.json"))}

    def key(self, stage: str, *inputs: BaseModel | str | int | None) -> str:
        """Names a stage's work by everything that decides its outcome."""
        parts = [i.model_dump_json() if isinstance(i, BaseModel) else json.dumps(i) for i in inputs]
        return content_id(stage, str(self.config.seed), *parts)

    def finished(self, stage: str, key: str) -> Manifest | None:
        """The stage's manifest if it is done, here or in the run named by `reuse`."""
        if found := self._manifest(self.url, stage, key):
            logger.info("%s: already finished (%s)", stage, found.summary)
            return found
        if self.config.reuse is None:
            return None
        other = storage.absolute(self.config.reuse)
        if found := self._manifest(other, stage, key):
            curve = storage.join("metrics", f"{stage}.jsonl")
            if storage.exists(storage.join(other, curve)):
                storage.write_bytes(storage.join(self.url, curve), storage.read_bytes(storage.join(other, curve)))
            storage.copy_folder(storage.join(other, "stages", stage), self.folder(stage), last="manifest.json")
            logger.info("%s: taken over from %s (%s)", stage, other, found.summary)
            return found
        return None

    def manifest(self, stage: str) -> Manifest | None:
        """The stage's manifest in this run, whatever its key."""
        path = self.folder(stage, "manifest.json")
        return Manifest(**storage.read_json(path)) if storage.exists(path) else None

    @staticmethod
    def _manifest(url: str, stage: str, key: str) -> Manifest | None:
        path = storage.join(url, "stages", stage, "manifest.json")
        if not storage.exists(path):
            return None
        manifest = Manifest(**storage.read_json(path))
        return manifest if manifest.key == key else None

    def finish(
        self, stage: str, key: str, *, since: float, num_rows: int, metrics: dict[str, Any], summary: str
    ) -> Manifest:
        """Write the manifest: from now on the stage is done."""
        manifest = Manifest(
            stage=stage,
            key=key,
            seconds=time.monotonic() - since,
            num_rows=num_rows,
            metrics=metrics,
            summary=summary,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        storage.write_json(self.folder(stage, "manifest.json"), asdict(manifest))
        logger.info("%s: %s (%.1f s)", stage, summary, manifest.seconds)
        return manifest

    def record_time(self, what: str, seconds: float, *, ended_at: float | None = None) -> None:
        """Keep a start-up or stage time for the report's table; `ended_at` (Unix time) if it is not now."""
        ended_at = time.time() if ended_at is None else ended_at
        self.timings.append({"what": what, "seconds": round(seconds, 3), "ended_at": round(ended_at, 3)})
        storage.write_json(storage.join(self.home or self.url, "timings.json"), self.timings)


def round_folder(url: str, number: int) -> str:
    """Where a round of the run at `url` is: the first in its own stages and metrics, a later one in rounds/<number>."""
    return url if number == 1 else storage.join(url, "rounds", str(number))


def round_name(name: str, number: int) -> str:
    """What a policy or a reward of a round is called beside those of the others: ppo, ppo-2, ppo-3."""
    return name if number == 1 else f"{name}-{number}"


def _num_spent(folder: str) -> int:
    """Label queries that a finished round has paid for; 0 for one without paid stages."""
    paths = (storage.join(folder, "stages", stage, "manifest.json") for stage in PAID_STAGES)
    found = [storage.read_json(path)["metrics"] for path in paths if storage.exists(path)]
    # manifests of before there were rounds: the ledger's count was the one round's
    return sum(metrics.get("num_spent", metrics.get("label", {}).get("spent", 0)) for metrics in found)


def open_run(config: RunConfig) -> Run:
    """Open a run directory, or make it. The same config continues it; any other is refused.

    Raises:
        RunDirectoryError: it belongs to another config; names the settings that differ.
    """
    url = storage.absolute(config.run_dir)
    path = storage.join(url, "config.json")
    mine = config.model_dump(mode="json")
    if storage.exists(path):
        differing = differences(storage.read_json(path), mine)
        if differing:
            raise RunDirectoryError(
                f"run_dir {url} belongs to another config; these settings differ: {', '.join(differing[:6])}. "
                "Choose another run_dir, or delete that folder"
            )
    else:
        storage.write_json(path, mine)
    timings = storage.join(url, "timings.json")
    return Run(
        config=_with_absolute_models(config),
        url=url,
        timings=storage.read_json(timings) if storage.exists(timings) else [],
    )


def _with_absolute_models(config: RunConfig) -> RunConfig:
    """Workers run in folders of their own: what is a local model folder here must be one there."""

    def here(table: Table, *names: str) -> Any:
        paths = {name: getattr(table, name) for name in names}
        local = {name: storage.absolute(path) for name, path in paths.items() if path and Path(path).is_dir()}
        return table.model_copy(update=local)

    spg = here(config.refresh.spg, "entailment_model", "embedder")
    return config.model_copy(
        update={
            "policy": here(config.policy, "path"),
            "select": here(config.select, "embedder"),
            "reward_model": here(config.reward_model, "path"),
            "refresh": config.refresh.model_copy(update={"spg": spg}),
        }
    )


def differences(theirs: Any, mine: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ between two resolved configs; not where a run is, or is shown."""
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return [] if theirs == mine else [f"{prefix} ({theirs!r} there, {mine!r} now)"]
    names = sorted(set(theirs) | set(mine))
    return [
        difference
        for name in names
        if prefix or name not in ("run_dir", "reuse", "tracking")
        for difference in differences(theirs.get(name), mine.get(name), f"{prefix}.{name}" if prefix else name)
    ]
