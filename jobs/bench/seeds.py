"""Parts of a study that `rayrl study` cannot express: variants run over seeds, and means with standard errors."""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import ray
from hardware import hardware

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.statistics import paired_difference
from rayrl.config import RunConfig
from rayrl.pipelines.run_pipeline import Pipeline, run_pipeline
from rayrl.preflight import check
from rayrl.report.formats import json_value
from rayrl.runs import storage
from rayrl.runs.run import open_run, read_manifest
from rayrl.runs.stage_metrics import StageMetrics
from rayrl.runs.stage_table import EVALUATE, Stage


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one run."""

    difference: Estimate
    """Gain over M1 in mean oracle score."""


T = TypeVar("T")
R = TypeVar("R", bound=Result)
M = TypeVar("M", bound=StageMetrics)


def study(
    about: str | None,
    names: Sequence[str],
    run: Callable[[argparse.Namespace, str, int], R],
    table: Callable[[Mapping[str, list[R]]], str],
) -> None:
    """Run a study from its command line: every variant with every seed, then the table.

    Args:
        about: The script's docstring; --help prints its first line.
        names: Names of the variants.
        run: Runs one variant with one seed.
        table: Makes the table of all results: by variant, one for every seed.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(names), choices=list(names))
    parser.add_argument("--out", type=Path, help="also write the numbers of every run as JSON")
    options = parser.parse_args()
    machine = hardware()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = time.monotonic()
    results: dict[str, list[R]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            results[name].append(run(options, name, seed))
            logging.info("%s seed %d: %s", name, seed, results[name][-1].difference)
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{machine}; {options.config} {' '.join(options.overrides)}, seeds {options.seeds}, {minutes:.0f} minutes\n"
    )
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps(json_value(results), indent=2))


def finish(config: RunConfig, pipeline: Pipeline) -> str:
    """Run a pipeline to its evaluation, unless an earlier study has; return the run's folder.

    Raises:
        RunDirectoryError: the folder belongs to another config.
    """
    url = storage.absolute(config.run_dir)
    if read_manifest(url, EVALUATE) is not None:
        return open_run(config).url
    run_pipeline(config, check(config), pipeline, ray_start_s=0.0)
    return url


def finished_metrics(folder: str, stage: Stage[M]) -> M:
    """Read the metrics of a stage that every run of a study has."""
    manifest = read_manifest(folder, stage)
    if manifest is None:
        raise ValueError(f"{folder} has not finished {stage.name}; rerun the study")
    return manifest.metrics


def measured(value: T | None, name: str) -> T:
    """Insist on a measurement, which a run of a study has, but one without an evaluation budget has not."""
    if value is None:
        raise ValueError(f"{name} must be measured by every run of a study, and is not; raise evaluate.budget")
    return value


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over the seeds, and its standard error; NaN with one seed."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def pooled(estimates: Sequence[Estimate]) -> tuple[float, float, float]:
    """Return the mean of one estimate per seed, and its standard errors over the seeds and over the prompts."""
    mean, between = over_seeds([estimate.mean for estimate in estimates])
    within = math.sqrt(sum(estimate.standard_error**2 for estimate in estimates)) / len(estimates)
    return mean, between, within


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Estimate:
    """Estimate the mean difference over the prompts that both have."""
    both = sorted(ours.keys() & theirs.keys())
    return paired_difference(np.array([ours[p] for p in both]), np.array([theirs[p] for p in both]))


def plus_minus(estimates: Sequence[Estimate | None], pattern: str = ".3f") -> str:
    """Format mean +- standard error over seeds (if there are several), over prompts; "-" without an estimate."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return "-"
    mean, between, within = pooled(known)
    errors = [f"{error:{pattern.removeprefix('+')}}" for error in (between, within) if not math.isnan(error)]
    return f"{mean:{pattern}} +- {', '.join(errors)}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
