"""One run on disk: the resolved config, and one manifest per finished stage, written last.

A stage is finished if and only if its manifest is there and carries the key of its inputs. The key is a hash of the
stage's own settings and the keys of what it read, so that another run's stage with the same key (`reuse`) is the same
work.

A later round is a view of the run (`Run.rounds`): its stages and curves lie in a folder of its own, and it has a seed
and a budget of its own. The config is the whole run's in every view.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from rayrl.algorithms.budget import round_share
from rayrl.config import RunConfig, Table
from rayrl.errors import DataError, RunDirectoryError
from rayrl.records import content_id, drawn_seed
from rayrl.runs import storage
from rayrl.runs.stage_metrics import StageMetrics
from rayrl.runs.stage_table import PREFERENCES, QUERY, AnyStage, Stage

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=StageMetrics)
T = TypeVar("T", bound=Table)

KeyPart = BaseModel | str | int | float | bool | Sequence[str] | None
"""What a key can be made of: a table of the config, another key, a plain value."""

CONFIG = "config.json"
MANIFEST = "manifest.json"
MAX_DIFFERENCES = 6
"""Settings that a refusal names."""
PLACES = ("run_dir", "reuse", "tracking")
"""Settings that say where a run lies and is shown, and may differ when it continues."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Generic[M]):
    """What a finished stage leaves behind, beside its table or checkpoint."""

    stage: str
    key: str
    seconds: float
    num_rows: int
    metrics: M
    summary: str
    finished_at: str


def read_manifest(url: str, stage: Stage[M]) -> Manifest[M] | None:
    """The manifest of a stage in the folder of a run or round; None if the stage is not finished there.

    Raises:
        DataError: the file is damaged, or does not hold this stage's metrics.
    """
    path = storage.join(url, "stages", stage.name, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        content = storage.read_json(path)
        return Manifest(**(content | {"metrics": TypeAdapter(stage.metrics).validate_python(content["metrics"])}))
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise DataError(
            f"{path} must be the manifest of a finished stage, but is damaged or of another version of rayrl "
            f"({str(error).splitlines()[0]}): delete this one file, and the same command repeats the stage; what was "
            "paid stays in the ledger and is not paid again"
        ) from None


@dataclass(kw_only=True)
class Run:
    """A run directory and the config it belongs to; or a view of one of its rounds."""

    config: RunConfig
    url: str
    """Folder of the run, or of the round where this is a view of a later one."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    """Shared by all views: start-up and stage times, kept in the run's timings.json."""
    round: int = 1
    home: str | None = None
    """Folder of the whole run, where this is a view of a later round."""
    share: int | None = None
    """Label queries of this round; None in the run itself, which has all of them."""

    @property
    def seed(self) -> int:
        """The run's seed; a later round has one of its own, so that it draws anew."""
        return self.config.seed if self.round == 1 else drawn_seed("round", str(self.config.seed), str(self.round))

    @property
    def budget(self) -> int:
        """Label queries that the stages of this view may pay for."""
        return self.config.select.budget if self.share is None else self.share

    def rounds(self) -> Iterator["Run"]:
        """The rounds in order, each made when the one before it is over: it spends what that has left.

        What the rounds before have spent is read from their manifests, not from the ledger: an interrupted round gets
        the same share again.
        """
        for number in range(1, self.config.rounds + 1):
            # Read when the round begins, and not before: only then have the earlier ones spent what they will.
            spent = sum(num_label_queries(round_folder(self.url, earlier)) for earlier in range(1, number))
            share = round_share(self.config.select.budget, spent, self.config.rounds - number + 1)
            is_first = number == 1
            home = None if is_first else self.url
            yield replace(self, url=round_folder(self.url, number), round=number, home=home, share=share)

    def folder(self, stage: AnyStage, *parts: str) -> str:
        """URL inside a stage's folder."""
        return storage.join(self.url, "stages", stage.name, *parts)

    def curve(self, stage: AnyStage) -> str:
        """URL of a training's curve: one JSON object per logged step."""
        return storage.join(self.url, "metrics", f"{stage.name}.jsonl")

    def key(self, stage: AnyStage | str, *inputs: KeyPart) -> str:
        """Name a stage's work by everything that decides its outcome; the seed is always a part of it."""
        name = stage if isinstance(stage, str) else stage.name
        # JSON tells "3" from 3 and an absent part from an empty one, so that other inputs never give the same key.
        parts = [i.model_dump_json() if isinstance(i, BaseModel) else json.dumps(i) for i in inputs]
        return content_id(name, str(self.seed), *parts)

    def manifest(self, stage: Stage[M]) -> Manifest[M] | None:
        """The stage's manifest in this run, whatever its key."""
        return read_manifest(self.url, stage)

    def finished(self, stage: Stage[M], key: str) -> Manifest[M] | None:
        """The stage's manifest if this work is done, here or in the run named by `reuse`, from which it is copied."""
        found = read_manifest(self.url, stage)
        if found is not None and found.key == key:
            logger.info("%s: already finished (%s)", stage.name, found.summary)
            return found
        if self.config.reuse is None:
            return None
        # A round reuses the round of the same number: a longer run goes on from a shorter one.
        other = round_folder(storage.absolute(self.config.reuse), self.round)
        try:
            found = read_manifest(other, stage)
        except DataError:
            path = storage.join(other, "stages", stage.name, MANIFEST)
            raise DataError(
                f"reuse must name a run of this version of rayrl, got {self.config.reuse}, of which {path} cannot be "
                "read; leave reuse out, or name another run"
            ) from None
        if found is None or found.key != key:
            return None
        # The curve lies outside the stage's folder, and the report reads it.
        curve = storage.join(other, "metrics", f"{stage.name}.jsonl")
        if storage.exists(curve):
            storage.write_bytes(self.curve(stage), storage.read_bytes(curve))
        # The manifest last: a process that dies while it copies leaves a stage that is not finished.
        storage.copy_folder(storage.join(other, "stages", stage.name), self.folder(stage), last=MANIFEST)
        logger.info("%s: taken over from %s (%s)", stage.name, other, found.summary)
        return found

    def finish(
        self, stage: Stage[M], key: str, *, since: float, num_rows: int, metrics: M, summary: str
    ) -> Manifest[M]:
        """Write the manifest: from now on the stage is done. `since` is when it began, on `time.monotonic`'s clock."""
        manifest = Manifest(
            stage=stage.name,
            key=key,
            seconds=time.monotonic() - since,
            num_rows=num_rows,
            metrics=metrics,
            summary=summary,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        storage.write_json(self.folder(stage, MANIFEST), asdict(manifest))
        logger.info("%s: %s (%.1f s)", stage.name, summary, manifest.seconds)
        return manifest

    def record_time(self, what: str, seconds: float, *, ended_at: float | None = None) -> None:
        """Keep a start-up or stage time for the report's table; `ended_at` (Unix time) if it is not now."""
        ended_at = time.time() if ended_at is None else ended_at
        self.timings.append({"what": what, "seconds": round(seconds, 3), "ended_at": round(ended_at, 3)})
        storage.write_json(storage.join(self.home or self.url, "timings.json"), self.timings)


def round_folder(url: str, number: int) -> str:
    """Locate a round of the run at `url`: the first is the run's own folder, a later one is rounds/<number>."""
    return url if number == 1 else storage.join(url, "rounds", str(number))


def round_name(name: str, number: int) -> str:
    """Name a policy or a reward of a round, so that it differs from those of other rounds: ppo, ppo-2, ppo-3."""
    return name if number == 1 else f"{name}-{number}"


def num_label_queries(url: str) -> int:
    """Label queries that the round in a folder has paid for, by the manifests of its paid stages; 0 before they end."""
    # A round has one of them: it judges responses, or it compares them.
    judged, compared = read_manifest(url, QUERY), read_manifest(url, PREFERENCES)
    of_judgements = judged.metrics.num_spent if judged is not None else 0
    asked = compared.metrics.asked if compared is not None else None
    return of_judgements + (asked.num_spent if asked is not None else 0)


def open_run(config: RunConfig) -> Run:
    """Open a run directory, or make it. The same config continues it; any other is refused.

    Raises:
        RunDirectoryError: the folder belongs to another config; the message names the settings that differ.
    """
    url = storage.absolute(config.run_dir)
    if not belongs_to(url, config):
        storage.write_json(storage.join(url, CONFIG), config.model_dump(mode="json"))
    timings = storage.join(url, "timings.json")
    return Run(
        config=_with_absolute_models(config),
        url=url,
        timings=storage.read_json(timings) if storage.exists(timings) else [],
    )


def belongs_to(url: str, config: RunConfig) -> bool:
    """Return whether the folder at `url` is a run of this config; False if it is not a run yet.

    Raises:
        RunDirectoryError: it is a run of another config; the message names the settings that differ.
    """
    path = storage.join(url, CONFIG)
    if not storage.exists(path):
        return False
    differing = differences(storage.read_json(path), config.model_dump(mode="json"))
    if differing:
        # Nothing advises to delete the folder: its ledger holds what was paid for.
        raise RunDirectoryError(
            f"run_dir {url} belongs to another config; these settings differ: "
            f"{', '.join(differing[:MAX_DIFFERENCES])}. Choose another run_dir, or set them back"
        )
    return True


def _with_absolute_models(config: RunConfig) -> RunConfig:
    """Make the paths of local model folders absolute: Ray's workers run in folders of their own."""

    def here(table: T, *names: str) -> T:
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


def differences(theirs: object, mine: object, prefix: str = "") -> list[str]:
    """List the dotted names of the settings that differ between two resolved configs, with both values."""
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return [] if theirs == mine else [f"{prefix} ({theirs!r} there, {mine!r} now)"]
    their_table, my_table = cast(dict[str, object], theirs), cast(dict[str, object], mine)
    found: list[str] = []
    for name in sorted({*their_table, *my_table}):
        if not prefix and name in PLACES:
            continue
        dotted = f"{prefix}.{name}" if prefix else name
        found += differences(their_table.get(name), my_table.get(name), dotted)
    return found
