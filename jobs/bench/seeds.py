"""What the studies share: variants run over seeds, each into a folder of its own, and means with standard errors."""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from hardware import hardware

from rayrl.config import RunConfig
from rayrl.pipelines.run_pipeline import Pipeline, run_pipeline
from rayrl.preflight import check
from rayrl.runs import storage
from rayrl.runs.run import open_run

Results = dict[str, list[dict[str, Any]]]
"""By variant, what one run came to for every seed."""


def study(
    about: str | None,
    names: Sequence[str],
    run: Callable[[argparse.Namespace, str, int], dict[str, Any]],
    table: Callable[[Results], str],
) -> None:
    """The command line of a study: every variant with every seed, then the table.

    Args:
        about: the script's docstring; --help says its first line.
        names: of the variants.
        run: what one variant comes to with one seed, its gain over M1 as "difference".
        table: of all results.
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
    results: Results = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            results[name].append(run(options, name, seed))
            logging.info("%s seed %d: %s", name, seed, results[name][-1]["difference"])
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{machine}; {options.config} {' '.join(options.overrides)}, seeds {options.seeds}, {minutes:.0f} minutes\n"
    )
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


def finish(config: RunConfig, pipeline: Pipeline) -> str:
    """Run to the evaluation, unless an earlier study has; the run's folder.

    Raises:
        RunDirectoryError: the folder is another config's.
    """
    url = storage.absolute(config.run_dir)
    if storage.exists(storage.join(url, "stages", "evaluate", "manifest.json")):
        return open_run(config).url
    run_pipeline(config, check(config), pipeline, ray_start_s=0.0)
    return url


def stage_metrics(folder: str, stage: str) -> dict[str, Any]:
    """What a stage's manifest says; nothing of a stage the run does not have."""
    path = storage.join(folder, "stages", stage, "manifest.json")
    return storage.read_json(path)["metrics"] if storage.exists(path) else {}


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean over the seeds, and its standard error; NaN with one seed."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def pooled(estimates: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean of one estimate per seed, and its standard errors: over the seeds, and over the prompts within them."""
    mean, between = over_seeds([estimate["mean"] for estimate in estimates])
    within = math.sqrt(sum(estimate["standard_error"] ** 2 for estimate in estimates)) / len(estimates)
    return mean, between, within


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over the seeds of a plain number."""
    return statistics.mean(row[name] for row in rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
