"""The run directory: whose it is, whether it can be written, and whether its disk is large enough."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rayrl.config import RunConfig, TrainingConfig
from rayrl.errors import ConfigError, ResourceError, RunDirectoryError
from rayrl.preflight.model import ModelFacts
from rayrl.runs import storage
from rayrl.runs.run import differences
from rayrl.training.checkpoints import NUM_KEPT

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the entry point of a submitted job."""
_SHOWN_DIFFERENCES = 6
_OPTIMIZER_BYTES = 12
"""Per parameter: float32 master weights and two moments."""
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
        try:
            is_local = storage.is_local(url)
        except (
            ImportError,
            ValueError,
        ) as error:  # fsspec: a package is missing, or nobody knows the protocol
            raise ConfigError(
                f"{setting} must be a path or an fsspec URL that can be opened, got {url}: {error}"
            ) from None
        if is_local and SUBMITTED in os.environ and not os.path.isabs(url.partition("://")[2] or url):
            raise ConfigError(
                f"{setting} must be an absolute path inside a Ray job (its working folder is deleted), got {url}; "
                "name a folder that every node sees, as /mnt/..., or an fsspec URL"
            )
    if config.reuse is not None and not storage.exists(storage.join(storage.absolute(config.reuse), "config.json")):
        raise RunDirectoryError(f"reuse must be another run's folder (with a config.json), got {config.reuse}")
    url = storage.absolute(config.run_dir)
    if not storage.is_local(url):
        _check_reachable(url)
    saved = storage.join(url, "config.json")
    if storage.exists(saved):
        differing = differences(storage.read_json(saved), config.model_dump(mode="json"))
        if differing:
            raise RunDirectoryError(
                f"run_dir {url} belongs to another config; these settings differ: "
                f"{', '.join(differing[:_SHOWN_DIFFERENCES])}. Choose another run_dir, or delete that folder"
            )
    if storage.is_local(url):
        parent = existing_parent(url)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"run_dir must be a folder that can be written, got {url}: {parent} cannot be")


def _check_reachable(url: str) -> None:
    """Refuse a remote place that does not answer, or whose bucket is not there.

    Raises:
        RunDirectoryError: says what the filesystem said.
    """
    fs, path = storage.locate(url)
    bucket = path.partition("/")[0]  # empty on filesystems without buckets
    remedy = "check the bucket's name, the endpoint (AWS_ENDPOINT_URL) and the keys, which no config holds"
    try:
        fs.exists(path)
        found = not bucket or fs.exists(bucket)
    except Exception as error:  # every filesystem has errors of its own
        raise RunDirectoryError(f"run_dir must be a place that can be read, got {url}: {error}; {remedy}") from None
    if not found:
        raise RunDirectoryError(
            f"run_dir must be in a bucket that exists and that these keys may list, got {url}; make it, or {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """What a run still has to write, in bytes, and what its disk has free; None is unknown."""

    needed: int | None = None
    """At most, about: whole fits' checkpoints, and responses as long as they may be; less what is there."""
    free: int | None = None

    def warnings(self) -> list[str]:
        """What may not fit; what cannot fit was refused."""
        if self.needed is None or self.free is None or self.needed <= self.free:
            return []
        return [
            f"run_dir: with all checkpoints of a fit, and responses as long as generate.max_tokens allows, it may take "
            f"{_gib(self.needed)}, and its disk has {_gib(self.free)} free; free some, or put it on another disk"
        ]


def check_disk(config: RunConfig, model: ModelFacts, num_responses: int) -> DiskFacts:
    """What the run may write, an estimate, against what the disk of its folder has free, if that is a local one.

    What an earlier attempt has written there is not needed again.

    Raises:
        ResourceError: the weights and one checkpoint's optimizer alone are more than is free.
    """
    is_local = storage.is_local(config.run_dir)
    url = storage.absolute(config.run_dir)
    free = shutil.disk_usage(existing_parent(url)).free if is_local else None
    if model.weights_bytes is None or model.num_parameters is None:
        return DiskFacts(free=free)
    num_models, fits = _written(config)
    num_optimized = max((num for num, fit in fits if fit.lora is None), default=0)
    optimizer = num_optimized * _OPTIMIZER_BYTES * model.num_parameters
    there = sum(storage.sizes(url).values()) if is_local and storage.exists(url) else 0
    least = max(0, num_models * model.weights_bytes + optimizer - there)
    if free is not None and least > free:
        raise ResourceError(
            f"run_dir {config.run_dir} needs {_gib(least)} at least (weights and optimizer), "
            f"and its disk has {_gib(free)} free; free some, or put run_dir on another disk"
        )
    tables = num_responses * config.generate.max_tokens * _TABLE_BYTES_PER_TOKEN
    return DiskFacts(needed=least + NUM_KEPT * optimizer + tables, free=free)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def _written(config: RunConfig) -> tuple[int, list[tuple[int, TrainingConfig]]]:
    """Models of the policy's size that are on disk at the end or at once, and each fit with how many it optimizes."""
    sft: list[tuple[int, TrainingConfig]] = [(1, config.sft)] * config.sft.enabled
    if config.pipeline == "proxy_dpo":
        return 2 * config.rounds + len(sft), [*sft, (1, config.evaluator), (1, config.dpo)]
    kept, served = 2, 2  # the last policy and the best one; those on their way to the replicas, until PPO ends
    ppo = (2, config.ppo)  # policy and value model
    if config.ppo.reward == "reward_model":
        again = config.rounds if config.asks_for_comparisons else 1  # a file's pairs make one r and one pi
        num_fits = again * (config.reward_model.path is None) + config.rounds * (config.refresh.method != "none")
        num_models = len(sft) + config.reward_model.num_members * num_fits + kept * (again + config.rounds) + served
        return num_models, [*sft, (1, config.reward_model), ppo]
    evaluator: list[tuple[int, TrainingConfig]] = [(1, config.evaluator)] * (config.ppo.reward == "evaluator")
    return len(sft) + (len(evaluator) + kept) * config.rounds + served, [*sft, *evaluator, ppo]


def existing_parent(path: str) -> Path:
    """The path itself or the nearest parent that exists."""
    return next(p for p in [Path(path), *Path(path).parents] if p.exists())
