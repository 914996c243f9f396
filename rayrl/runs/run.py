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
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from rayrl.algorithms.budget import round_share
from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import RunConfig, Table
from rayrl.errors import DataError, RunDirectoryError
from rayrl.records import content_id, drawn_seed
from rayrl.runs import storage
from rayrl.runs.content import changed_inputs, contents_of, inputs_of
from rayrl.runs.damage import Files, damage, record_files
from rayrl.runs.stage_metrics import StageMetrics
from rayrl.runs.stage_table import PREFERENCES, QUERY, SELECT, AnyStage, Stage

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=StageMetrics)
T = TypeVar("T", bound=Table)

KeyPart = Table | str | int | float | bool | Sequence[str] | None
"""What a key can be made of: a table of the config, another key, a plain value."""

CONFIG = "config.json"
INPUTS = "inputs.json"
"""In a run's folder: the digest of every input's content at the last start, by setting (`rayrl.runs.content`)."""
CLUSTER = "cluster.json"
"""In a run's folder: the address of the cluster that it last ran in."""
WAITING = "waiting.json"
"""In a parked run's folder: what it waits for (`rayrl.oracles.people.waiting.Waiting`)."""
IDENTITY = "identity.json"
"""In a run's folder: an id that stays with it wherever it lies, and by which a ledger knows the run's questions."""
LEDGER = "ledger.sqlite"
"""In a run's folder: its account of paid questions, where `oracle.ledger` names no other."""
FIT = "fit"
"""Folder, inside a stage's, of a training's checkpoints."""
MANIFEST = "manifest.json"
MODEL_CONFIG = "config.json"
"""In the folder of a model."""
MAX_MISTAKES = 3
"""Mistakes of a damaged config that a message lists."""
MAX_DIFFERENCES = 6
"""Settings that a refusal names."""
WORK = "work.json"
"""In a stage's folder: the key of the work that the folder's files belong to."""


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
    files: Files = field(default_factory=dict)
    """The files of its folder (`rayrl.runs.damage`); none of a stage that an older rayrl finished."""


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
    id: str = ""
    """Names the run in ledgers that several runs share."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    """Shared by all views: start-up and stage times, kept in the run's timings.json."""
    round: int = 1
    home: str | None = None
    """Folder of the whole run, where this is a view of a later round."""
    share: int | None = None
    """Label queries of this round; None in the run itself, which has all of them."""
    contents: dict[str, str] = field(default_factory=dict)
    """Digest of every input's content, by the setting that names it."""

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
        """Name a stage's work by everything that decides its outcome.

        The seed is always a part of it, and so are the `engine_args` of the fleets that the stage asks, if any are set.
        A table of the config brings the content of what it names with it (`content`).
        """
        name = stage if isinstance(stage, str) else stage.name
        # JSON tells "3" from 3 and an absent part from an empty one, so that other inputs never give the same key.
        parts = [i.science_json() if isinstance(i, Table) else json.dumps(i) for i in inputs]
        tables = [name for name in RunConfig.model_fields if any(getattr(self.config, name) is i for i in inputs)]
        parts += [content for table in tables for content in self.content(f"{table}.")]
        engines = {} if isinstance(stage, str) else engine_args(stage, self.config)
        if engines:
            parts.append(json.dumps(engines))
        return content_id(name, str(self.seed), *parts)

    def content(self, prefix: str) -> list[str]:
        """Return the digests of the inputs that the settings with this beginning name, in the order of the settings."""
        return [
            f"{setting} {self.contents[setting]}" for setting in sorted(self.contents) if setting.startswith(prefix)
        ]

    def manifest(self, stage: Stage[M]) -> Manifest[M] | None:
        """The stage's manifest in this run, whatever its key."""
        return read_manifest(self.url, stage)

    def finished(self, stage: Stage[M], key: str) -> Manifest[M] | None:
        """The stage's manifest if this work is done, here or in the run named by `reuse`, from which it is copied.

        None: it is to be done. Its folder then holds nothing, or this work half-done; files of other work (the settings
        or the inputs have changed since) are removed, but for those that name their own work. Nothing paid is among
        them: that is in the ledger.
        """
        found = read_manifest(self.url, stage)
        if found is not None and found.key == key and self._is_whole(stage, found):
            logger.info("%s: already finished (%s)", stage.name, found.summary)
            storage.remove_folder(self.folder(stage, FIT))  # a process that died right after the manifest has left them
            return found
        taken = self._taken_over(stage, key)
        if taken is None:
            self._make_room(stage, key)
        return taken

    def _is_whole(self, stage: Stage[M], manifest: Manifest[M]) -> bool:
        """Return whether the files of a finished stage are as they were; of a damaged one only whole files stay.

        It then is a stage that goes on: whole parts of its tables are read, what is missing is made again, and what was
        paid comes from the ledger.
        """
        wrong = damage(self.folder(stage), manifest.files)
        if wrong:
            logger.warning("%s: finished, but damaged since, and made again: %s", stage.name, describe(wrong))
            unfinish(self.folder(stage), wrong)
            if stage.training(self.config) is not None:
                storage.remove(self.curve(stage))  # of the training that is now done again
        return not wrong

    def _taken_over(self, stage: Stage[M], key: str) -> Manifest[M] | None:
        """Copy the stage from the run named by `reuse`, if it has done this work; None if it has not."""
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
        wrong = damage(storage.join(other, "stages", stage.name), found.files)
        if wrong:
            logger.warning("%s is damaged in %s, and is not taken over: %s", stage.name, other, describe(wrong))
            return None
        # Half a copy must not look like work of our own that goes on.
        storage.remove(self.folder(stage, MANIFEST))
        storage.remove(self.folder(stage, WORK))
        storage.remove(self.curve(stage))
        # The curve lies outside the stage's folder, and the report reads it.
        curve = storage.join(other, "metrics", f"{stage.name}.jsonl")
        if storage.exists(curve):
            storage.write_bytes(self.curve(stage), storage.read_bytes(curve))
        # The manifest last: a process that dies while it copies leaves a stage that is not finished.
        storage.copy_folder(storage.join(other, "stages", stage.name), self.folder(stage), last=(WORK, MANIFEST))
        if not (storage.is_local(other) and storage.is_local(self.url)):  # a store has times and marks of its own
            found = replace(found, files=record_files(self.folder(stage), found.files.__contains__))
            storage.write_json(self.folder(stage, MANIFEST), asdict(found))
        logger.info("%s: taken over from %s (%s)", stage.name, other, found.summary)
        return found

    def _make_room(self, stage: AnyStage, key: str) -> None:
        """Empty a stage's folder of other work, and name the work that it holds from now on.

        Sub-folders that name their own work stay (`Stage.kept`).
        """
        path = self.folder(stage, WORK)
        is_own = storage.exists(path)  # otherwise it may be half a copy of another run's
        if is_own and storage.read_json(path) == {"key": key}:
            return
        found = storage.children(self.folder(stage))
        if found:
            logger.info("%s: other work than before is to be done, and the old is removed", stage.name)
        storage.remove(self.folder(stage, MANIFEST))
        if is_own:
            storage.write_json(path, {"key": None})  # what an interruption leaves is no work that could go on
        for name in found:
            if name != WORK and not (is_own and name.startswith(stage.kept)):
                storage.remove_folder(self.folder(stage, name))
        storage.remove(self.curve(stage))
        storage.write_json(path, {"key": key})

    def finish(
        self, stage: Stage[M], key: str, *, since: float, num_rows: int, metrics: M, summary: str
    ) -> Manifest[M]:
        """Write the manifest: from now on the stage is done, and its fits give their checkpoints back.

        `since` is when it began, on `time.monotonic`'s clock.
        """
        manifest = Manifest(
            stage=stage.name,
            key=key,
            seconds=time.monotonic() - since,
            num_rows=num_rows,
            metrics=metrics,
            summary=summary,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=record_files(self.folder(stage), _belongs_to_result),
        )
        storage.write_json(self.folder(stage, MANIFEST), asdict(manifest))
        # Only now: a process that dies before the manifest goes on from the last checkpoint, which is that of the end.
        storage.remove_folder(self.folder(stage, FIT))
        logger.info("%s: %s (%.1f s)", stage.name, summary, manifest.seconds)
        return manifest

    def record_time(self, what: str, seconds: float, *, ended_at: float | None = None) -> None:
        """Keep a start-up or stage time for the report's table; `ended_at` (Unix time) if it is not now."""
        ended_at = time.time() if ended_at is None else ended_at
        self.timings.append({"what": what, "seconds": round(seconds, 3), "ended_at": round(ended_at, 3)})
        storage.write_json(storage.join(self.home or self.url, "timings.json"), self.timings)


def _belongs_to_result(name: str) -> bool:
    """Tell, by its path in a stage's folder, whether a file is a part of what the stage leaves behind."""
    return name not in (MANIFEST, WORK) and not name.startswith(f"{FIT}/")


def unfinish(folder: str, wrong: Iterable[str]) -> None:
    """Make a damaged stage one that goes on: remove its manifest, and then what is damaged.

    Of a model, that is its whole folder: it is written whole or not at all.
    """
    storage.remove(storage.join(folder, MANIFEST))
    for name in wrong:
        parent = name.rpartition("/")[0]
        is_model = parent and storage.exists(storage.join(folder, parent, MODEL_CONFIG))
        is_model = is_model or name.rpartition("/")[2] == MODEL_CONFIG
        if is_model:
            storage.remove_folder(storage.join(folder, parent))
        else:
            storage.remove(storage.join(folder, name))


def describe(wrong: Mapping[str, str]) -> str:
    """List damaged files, for a message."""
    shown = [f"{name} {what}" for name, what in list(wrong.items())[:MAX_DIFFERENCES]]
    return "; ".join(shown) + (f"; and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else "")


def engine_args(stage: AnyStage, config: RunConfig) -> dict[str, Any]:
    """Return the arguments that the config has for the engines of a stage's fleets, by role; quantisation is one."""
    tables = {"generators": config.generators, "embedders": config.embedders}
    roles = sorted({use.role for use in stage.fleets(config)} & tables.keys())
    return {role: tables[role].science()["engine_args"] for role in roles if tables[role].engine_args}


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
    """Open a run directory, or make it. A config of the same science continues it; any other is refused.

    Raises:
        RunDirectoryError: the folder belongs to another config; the message names the settings that differ.
        DataError: its config is damaged, or of another version of rayrl.
    """
    url = storage.absolute(config.run_dir)
    belongs_to(url, config)
    # Written at every start: the settings of its operation may be others than before.
    storage.write_json(storage.join(url, CONFIG), config.model_dump(mode="json"))
    if not identity(url):
        storage.write_json(storage.join(url, IDENTITY), {"id": uuid.uuid4().hex})
    return Run(
        config=_with_absolute_models(config),
        url=url,
        id=identity(url),
        timings=_earlier_timings(url),
        contents=_noted_contents(url, config),
    )


def _noted_contents(url: str, config: RunConfig) -> dict[str, str]:
    """Find out the content of every input, say what has changed since the last start, and note it for the next one."""
    path = storage.join(url, INPUTS)
    try:
        before: dict[str, str] = storage.read_json(path) if storage.exists(path) else {}
    except ValueError as error:
        logger.warning("%s is damaged (%s): which inputs have changed since the last start is not known", path, error)
        before = {}
    contents = contents_of(config, before)
    places = {each.setting: each.place for each in inputs_of(config)}
    for setting in changed_inputs(before, contents):
        logger.warning(
            "%s %s has changed since the last start: what depends on it is done anew; what was paid stays in the "
            "ledger",
            setting,
            places[setting],
        )
    storage.write_json(path, contents)
    return contents


def ledger_url(url: str, config: RunConfig) -> str:
    """Locate the ledger of the run in a folder: its own, or the one that its config names."""
    return storage.join(url, LEDGER) if config.oracle.ledger is None else storage.absolute(config.oracle.ledger)


def identity(url: str) -> str:
    """Read the id of the run in a folder; "" if it has none yet.

    Raises:
        DataError: its file is damaged.
    """
    path = storage.join(url, IDENTITY)
    try:
        return str(storage.read_json(path)["id"]) if storage.exists(path) else ""
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} must hold the id by which the ledger knows this run's questions, but is damaged ({error}); the "
            'ledger has it in column run of table attempts: write it back as {"id": "..."}'
        ) from None


def note_waiting(url: str, waiting: Mapping[str, Any] | None) -> None:
    """Note what the run in a folder waits for, as it parks; None as it goes on."""
    if waiting is None:
        storage.remove(storage.join(url, WAITING))
    else:
        storage.write_json(storage.join(url, WAITING), waiting)


def noted_waiting(url: str) -> dict[str, Any] | None:
    """Read what a parked run waits for (`rayrl.oracles.people.waiting.Waiting`); None if it waits for nobody."""
    path = storage.join(url, WAITING)
    return storage.read_json(path) if storage.exists(path) else None


def note_cluster(url: str, address: str) -> None:
    """Note the cluster in which the run in a folder goes on, for `rayrl scale` and `rayrl stop`."""
    storage.write_json(storage.join(url, CLUSTER), {"address": address})


def noted_cluster(url: str) -> str | None:
    """Read the address of the cluster in which the run in a folder went on last; None if it is not known."""
    path = storage.join(url, CLUSTER)
    try:
        return str(storage.read_json(path)["address"]) if storage.exists(path) else None
    except (ValueError, KeyError, TypeError):  # damaged: as if it had never been noted
        return None


def _earlier_timings(url: str) -> list[dict[str, Any]]:
    """Read the times of earlier starts. They are only for the report's table: a damaged file is begun anew."""
    path = storage.join(url, "timings.json")
    try:
        return storage.read_json(path) if storage.exists(path) else []
    except ValueError as error:
        logger.warning("%s is damaged (%s): the start-up times of earlier starts are lost", path, error)
        return []


def read_config(run_dir: str) -> RunConfig:
    """Read the resolved config of a run.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: the file is damaged, or of another version of rayrl.
    """
    url = storage.absolute(run_dir)
    path = storage.join(url, CONFIG)
    if not storage.exists(path):
        raise RunDirectoryError(
            f"run_dir must be the folder of a run (with config.json in it), got {url}; "
            "`rayrl runs FOLDER` lists the runs in a folder"
        )
    try:
        return RunConfig.model_validate(storage.read_json(path))
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors()]
        reason = "; ".join(mistakes[:MAX_MISTAKES])
    except ValueError as error:
        reason = str(error)
    raise DataError(
        f"{path} must be the resolved config of a run of this version of rayrl, but is damaged or of another version "
        f"({reason}); read the run with the version that made it, or run again into another run_dir"
    )


def belongs_to(url: str, config: RunConfig) -> bool:
    """Return whether the folder at `url` is a run of this config's science; False if it is not a run yet.

    Raises:
        RunDirectoryError: it is a run of another config; the message names the settings that differ, and those that
            may. Or its label budget was raised, and it would select others.
        DataError: its config is damaged, or of another version of rayrl.
    """
    if not storage.exists(storage.join(url, CONFIG)):
        return False
    theirs = read_config(url)
    raised = {name for name, number in config.growing().items() if number >= theirs.growing().get(name, number)}
    differing = [name for name in differences(theirs.science(), config.science()) if name.split(" ")[0] not in raised]
    if differing:
        # Nothing advises to delete the folder: its ledger holds what was paid for.
        raise RunDirectoryError(
            f"run_dir {url} belongs to another config; these settings differ: "
            f"{', '.join(differing[:MAX_DIFFERENCES])}. Set them back; or choose another run_dir, with "
            f"reuse = {url!r} for the stages that stay the same and oracle.ledger = "
            f"{ledger_url(url, theirs)!r} for the answers that are paid. Between two starts of a run only its "
            f"operation may change ({', '.join(_tables_of(config.operation()))}), and "
            f"{', '.join(config.growing())} may be raised"
        )
    reason = _why_labels_cannot_be_added(config)
    if config.select.budget > theirs.select.budget and reason:
        raise RunDirectoryError(
            f"select.budget of run_dir {url} cannot be raised ({theirs.select.budget} there, {config.select.budget} "
            f"now): {reason}. Set it back; or choose another run_dir, with reuse = {url!r} for the stages that stay "
            f"the same and oracle.ledger = {ledger_url(url, theirs)!r} for the answers that are paid"
        )
    return True


def _why_labels_cannot_be_added(config: RunConfig) -> str | None:
    """Tell why a run that has begun cannot get a larger label budget; None if it can."""
    if not SELECT.occurs(config, 1):
        return None
    if config.rounds > 1:
        return (
            f"with rounds = {config.rounds} each round has a share of it, so that the first one would select anew, and "
            "the later ones would ask about other responses, beyond the budget"
        )
    strategy = config.select.strategy
    if config.labels != "expert" and not STRATEGIES[strategy].grows:
        return f'strategy "{strategy}" picks other responses for another budget, and not those that are paid and more'
    return None


def _tables_of(settings: Iterable[str]) -> list[str]:
    """Shorten a list of dotted settings: one entry per table, with the number of its settings."""
    num_by_table = Counter(setting.rpartition(".")[0] for setting in settings)
    names = [setting for setting in settings if "." not in setting]
    return names + [f"{num} settings of {table}" for table, num in num_by_table.items() if table]


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
        dotted = f"{prefix}.{name}" if prefix else name
        found += differences(their_table.get(name), my_table.get(name), dotted)
    return found
