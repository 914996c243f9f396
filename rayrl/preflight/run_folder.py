"""Checks of the run directory: it belongs to this config, it can be written, and its disk is large enough."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rayrl.config import RunConfig
from rayrl.errors import ConfigError, ResourceError, RunDirectoryError
from rayrl.fleets.connection import SUBMITTED
from rayrl.preflight.model import ModelFacts
from rayrl.report.ledger_counts import num_attempts
from rayrl.runs import storage
from rayrl.runs.run import (
    CONFIG,
    belongs_to,
    identity,
    ledger_url,
    num_label_queries,
    read_config,
    round_folder,
)
from rayrl.runs.stage_table import PPO, PPO_REFRESHED, stages_of
from rayrl.training.checkpoints import NUM_KEPT

_PPO_STAGES = (PPO, PPO_REFRESHED)
_OPTIMIZER_BYTES = 12
"""Per parameter, in memory and in a checkpoint: float32 master weights and two moments."""
_TABLE_BYTES_PER_TOKEN = 40
"""Text and 8-byte ids of a response, in the responses table and again in pairs and scores."""


def check_run_folder(config: RunConfig) -> None:
    """Refuse a run directory that belongs to another config or cannot be written; make nothing.

    Raises:
        RunDirectoryError: names the first settings that differ, or what is in the way.
        ConfigError: a relative path inside a Ray job, or a filesystem that is not installed.
    """
    for setting, url in (("run_dir", config.run_dir), ("reuse", config.reuse)):
        if url is None:
            continue
        if (
            is_local_place(url, setting)
            and SUBMITTED in os.environ
            and not os.path.isabs(url.partition("://")[2] or url)
        ):
            raise ConfigError(
                f"{setting} must be an absolute path inside a Ray job (its working folder is deleted), got {url}; "
                "name a folder that every node sees, as /mnt/..., or an fsspec URL"
            )
    if config.reuse is not None and not storage.exists(storage.join(storage.absolute(config.reuse), CONFIG)):
        raise RunDirectoryError(
            f"reuse must be another run's folder (with a config.json), got {config.reuse}; correct it, or leave reuse "
            "out"
        )
    check_place(config.run_dir, "run_dir")
    url = storage.absolute(config.run_dir)
    if belongs_to(url, config):
        _check_ledger(url, config)
        if config.reuse is None:
            check_paid_answers(url, config)
    if storage.is_local(url):
        parent = existing_parent(url)
        # A filesystem without room at all, as /proc, holds no files of users.
        is_writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) and shutil.disk_usage(parent).total > 0
        if not is_writable:
            raise RunDirectoryError(
                f"run_dir must be a folder that can be written, got {url}: {parent} cannot be; choose another run_dir, "
                "or give this user the right to write there"
            )


def _check_ledger(url: str, config: RunConfig) -> None:
    """Refuse another ledger than the one that counts what this run has spent.

    Raises:
        RunDirectoryError: the new one does not hold this run's questions.
    """
    old, new, run = ledger_url(url, read_config(url)), ledger_url(url, config), identity(url)
    if old == new or num_attempts(new, run) >= num_attempts(old, run):
        return
    raise RunDirectoryError(
        f"oracle.ledger must hold what this run has asked already, which is in {old}, got {new}; its budgets would "
        f"begin anew. Set it back, or copy the old one first: rayrl ledger {url} --export {new} (only where no ledger "
        "is there yet)"
    )


def check_paid_answers(url: str, config: RunConfig) -> None:
    """Refuse a ledger that has lost what the run's finished stages have paid for: it would be paid for again.

    Raises:
        RunDirectoryError: names how many answers there were and are.
    """
    paid = sum(num_label_queries(round_folder(url, number)) for number in range(1, config.rounds + 1))
    ledger = ledger_url(url, config)
    held = num_attempts(ledger, identity(url))
    if held < paid:
        raise RunDirectoryError(
            f"{ledger} must hold the {paid} label queries that this run has paid for, and holds {held}: it is damaged "
            "or another file; put it back from a copy, or begin anew in another run_dir, where they are paid again"
        )


def is_local_place(url: str, setting: str) -> bool:
    """Return whether a folder's URL is a path of the local filesystem.

    Raises:
        ConfigError: its filesystem is unknown, or not installed.
    """
    try:
        return storage.is_local(url)
    except (ImportError, ValueError) as error:  # fsspec: a package is missing, or the protocol is unknown
        raise ConfigError(
            f"{setting} must be a path or an fsspec URL that can be opened, got {url}: {error}; install the "
            "protocol's fsspec package, or correct the URL"
        ) from None


def check_place(url: str, setting: str) -> None:
    """Refuse a remote place that does not answer, or whose bucket does not exist.

    Raises:
        ConfigError: its filesystem is unknown, or not installed.
        RunDirectoryError: holds the filesystem's own message.
    """
    if is_local_place(url, setting):
        return
    fs, path = storage.locate(url)
    bucket = path.partition("/")[0]  # empty on filesystems without buckets
    remedy = "check the bucket's name, the endpoint (AWS_ENDPOINT_URL) and the keys, which no config holds"
    try:
        fs.exists(path)
        found = not bucket or fs.exists(bucket)
    except Exception as error:  # every filesystem has errors of its own
        raise RunDirectoryError(f"{setting} must be a place that can be read, got {url}: {error}; {remedy}") from None
    if not found:
        raise RunDirectoryError(
            f"{setting} must be in a bucket that exists and that these keys may list, got {url}; make it, or {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """Bytes that a run still has to write, and that its disk has free; None is unknown."""

    needed: int | None = None
    """At most, about: whole fits' checkpoints, and responses as long as they may be; less the files of an earlier
    attempt."""
    free: int | None = None

    def warnings(self) -> list[str]:
        """Warn of a run that may not fit; one that cannot was refused."""
        if self.needed is None or self.free is None or self.needed <= self.free:
            return []
        return [
            f"run_dir: with all checkpoints of a fit, and responses as long as generate.max_tokens allows, it may take "
            f"{_gib(self.needed)}, and its disk has {_gib(self.free)} free; free some, or put it on another disk"
        ]


def check_disk(config: RunConfig, model: ModelFacts, num_responses: int) -> DiskFacts:
    """Compare an estimate of what the run may write with the free space of its folder's disk, if that is a local one.

    Files of an earlier attempt are not written again.

    Raises:
        ResourceError: the weights and one checkpoint's optimizer alone are more than is free.
    """
    is_local = storage.is_local(config.run_dir)
    url = storage.absolute(config.run_dir)
    free = shutil.disk_usage(existing_parent(url)).free if is_local else None
    if model.weights_bytes is None or model.num_parameters is None:
        return DiskFacts(free=free)
    optimizer = num_optimized_models(config) * _OPTIMIZER_BYTES * model.num_parameters
    written = sum(storage.sizes(url).values()) if is_local and storage.exists(url) else 0
    least = max(0, num_written_models(config) * model.weights_bytes + optimizer - written)
    if free is not None and least > free:
        raise ResourceError(
            f"run_dir {config.run_dir} needs {_gib(least)} at least (weights and optimizer), "
            f"and its disk has {_gib(free)} free; free some, or put run_dir on another disk"
        )
    tables = num_responses * config.generate.max_tokens * _TABLE_BYTES_PER_TOKEN
    # A fit keeps its last checkpoints while it writes the next one, and gives them back when its stage is finished.
    checkpoints = (NUM_KEPT + 1) * optimizer
    return DiskFacts(needed=least - min(least, optimizer) + checkpoints + tables, free=free)


def num_written_models(config: RunConfig) -> int:
    """Models of the policy's size that are on the disk at the end of a run, or before that at once."""
    num = 0
    for stage, _ in stages_of(config):
        training = stage.training(config)
        if training is not None:
            # PPO keeps the last policy and the best one.
            num += 2 if stage in _PPO_STAGES else training.num_members
    # While rlp trains, the replicas have files of their own: two versions of the policy on their way to them.
    return num + 2 * (config.pipeline == "rlp")


def num_optimized_models(config: RunConfig) -> int:
    """Most models that one training of the run optimizes as a whole, and not by adapters."""
    most = 0
    for stage, _ in stages_of(config):
        training = stage.training(config)
        if training is not None and training.settings.lora is None:
            # PPO trains the policy and a value model.
            most = max(most, 2 if stage in _PPO_STAGES else 1)
    return most


def _gib(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:,.1f} {name}"


def existing_parent(path: str) -> Path:
    """Find the path itself or the nearest parent that exists."""
    return next(p for p in [Path(path), *Path(path).parents] if p.exists())
