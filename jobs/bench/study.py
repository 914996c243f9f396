"""The method beside its controls, over several seeds: what did the paid labels buy?

    python jobs/bench/study.py jobs/configs/stories.toml --seeds 0 1 2 [section.key=value ...]

Runs every variant with every seed into RUN_DIR/<variant>-<seed>, shares the stages that are equal (M1 and its
responses), and prints one table. Rerun it to continue an interrupted study.
"""

import argparse
from typing import Any

from seeds import Results, finish, markdown, mean_of, over_seeds, pooled, stage_metrics, study

from rayrl.config import RunConfig, load_config
from rayrl.pipelines.proxy_dpo import proxy_dpo
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


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    folder = finish(variant(options.config, options.overrides, name, seed), proxy_dpo)
    return stage_metrics(folder, "evaluate") | {"paid": stage_metrics(folder, "query")["label"]["spent"]}


def row(name: str, results: list[dict[str, Any]], ceiling: float) -> list[str]:
    gain, between, within = pooled([r["difference"] for r in results])
    win, win_error = over_seeds([r["win_rate"]["mean"] for r in results])
    cells = [TITLES[name], f"{mean_of(results, 'paid'):.0f}"]
    cells += [f"{gain:+.3f}", f"{between:.3f}", f"{within:.3f}", f"{gain / ceiling:.0%}" if ceiling else "-"]
    cells += [f"{win:.1%} +- {win_error:.1%}", f"{mean_of([r['kl'] for r in results], 'mean'):.2f}"]
    for metric in ("perplexity", "distinct2", "length"):
        before, after = (mean_of(results, f"{metric}_{m}") for m in ("m1", "m2"))
        cells.append(f"{before:.3g} -> {after:.3g}")
    return cells


def table(results: Results) -> str:
    ceiling = pooled([r["difference"] for r in results["expert"]])[0] if results.get("expert") else 0.0
    titles = ["labels", "paid", "gain", "SE (seeds)", "SE (prompts)", "of ceiling", "win rate", "KL (nats)"]
    titles += ["perplexity under M1", "distinct-2", "tokens"]
    return markdown(titles, [row(name, done, ceiling) for name, done in results.items() if done])


if __name__ == "__main__":
    study(__doc__, list(VARIANTS), run, table)
