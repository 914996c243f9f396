"""The method beside its controls, over several seeds: what did the paid labels buy?

    python jobs/bench/study.py jobs/configs/stories.toml --seeds 0 1 2 [section.key=value ...]

Runs every variant with every seed into RUN_DIR/<variant>-<seed>, shares the stages that are equal (M1 and its
responses), and prints one table. Rerun it to continue an interrupted study.
"""

import argparse
import json
import logging
import math
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import ray

from rayrl.config import RunConfig, load_config
from rayrl.pipelines.launch import run_pipeline
from rayrl.pipelines.proxy_dpo import proxy_dpo
from rayrl.preflight import check
from rayrl.runs import storage

VARIANTS: dict[str, list[str]] = {
    "k-center": [],
    "random": ["select.strategy=random"],
    "off-policy": ["generate.source=seed"],
    "direct": ["labels=direct", "select.unit=prompt"],
    "expert": ["labels=expert"],
    "shuffled": ["labels=shuffled"],
}
TITLES = {
    "k-center": "k-center selection (the method)",
    "random": "random selection, same budget",
    "off-policy": "seed data queried instead of M1's responses",
    "direct": "DPO on the paid labels alone, same budget",
    "expert": "the expert labels everything (ceiling)",
    "shuffled": "paid scores shuffled (floor)",
}


def variant(path: str, overrides: list[str], name: str, seed: int) -> RunConfig:
    base = load_config(path, [*overrides, *VARIANTS[name], f"seed={seed}"])
    folder = storage.join(base.run_dir, f"{name}-{seed}")
    shared = None if name == "k-center" else storage.join(base.run_dir, f"k-center-{seed}")
    return base.model_copy(update={"name": f"{base.name}-{name}-{seed}", "run_dir": folder, "reuse": shared})


def run(config: RunConfig) -> dict[str, Any]:
    finished = storage.join(storage.absolute(config.run_dir), "report.json")
    if not storage.exists(finished):
        run_pipeline(config, check(config), proxy_dpo, ray_start_s=0.0)
    folder = storage.join(storage.absolute(config.run_dir), "stages")
    manifests = {
        name: storage.read_json(f"{folder}/{name}/manifest.json")["metrics"] for name in ("query", "dpo", "evaluate")
    }
    return manifests["evaluate"] | {"paid": manifests["query"]["label"]["spent"]}


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds, and its standard error."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def row(name: str, results: list[dict[str, Any]], ceiling: float) -> str:
    gains = [r["difference"]["mean"] for r in results]
    gain, between = over_seeds(gains)
    within = math.sqrt(sum(r["difference"]["standard_error"] ** 2 for r in results)) / len(results)
    win, win_error = over_seeds([r["win_rate"]["mean"] for r in results])
    cells = [TITLES[name], f"{statistics.mean(r['paid'] for r in results):.0f}"]
    cells += [f"{gain:+.3f}", f"{between:.3f}", f"{within:.3f}", f"{gain / ceiling:.0%}" if ceiling else "-"]
    cells += [f"{win:.1%} +- {win_error:.1%}", f"{statistics.mean(r['kl']['mean'] for r in results):.2f}"]
    for metric in ("perplexity", "distinct2", "length"):
        before, after = (statistics.mean(r[f"{metric}_{m}"] for r in results) for m in ("m1", "m2"))
        cells.append(f"{before:.3g} -> {after:.3g}")
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    ceiling = over_seeds([r["difference"]["mean"] for r in results["expert"]])[0] if results.get("expert") else 0.0
    titles = ["labels", "paid", "gain", "SE (seeds)", "SE (prompts)", "of ceiling", "win rate", "KL (nats)"]
    titles += ["perplexity under M1", "distinct-2", "tokens"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += [row(name, done, ceiling) for name, done in results.items() if done]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="also write the numbers of every run as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = time.monotonic()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            results[name].append(run(variant(options.config, options.overrides, name, seed)))
            logging.info("%s seed %d: %s", name, seed, results[name][-1]["difference"])
    print(table(results))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{options.config}, seeds {options.seeds}, {platform.processor() or platform.machine()}, "
        f"{ray.cluster_resources().get('CPU', 0):g} cores, {minutes:.0f} minutes, {date.today()}"
    )
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
