"""Study of proxy DPO: the method beside its controls, over several seeds.

    python jobs/bench/study.py jobs/configs/stories.toml [section.key=value ...] --seeds 0 1 2

Runs every variant with every seed into RUN_DIR/<variant>-<seed>, shares the stages that are equal (M1 and its
responses), and prints one table. Rerun it to continue an interrupted study.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from seeds import Result, finish, finished_metrics, markdown, measured, over_seeds, pooled, study

from rayrl.config import load_config
from rayrl.pipelines.proxy_dpo import proxy_dpo
from rayrl.runs import storage
from rayrl.runs.stage_metrics import PolicyEvaluation
from rayrl.runs.stage_table import EVALUATE

BASE = "k-center"
"""The variant that runs the stages that all have in common."""
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    "random": ["select.strategy=random"],
    "off-policy": ["generate.source=seed"],
    "direct": ["labels=direct", "select.unit=prompt"],
    "expert": ["labels=expert"],
    "shuffled": ["labels=shuffled"],
}
TITLES = {
    BASE: "k-center selection (the method)",
    "random": "random selection, same budget",
    "off-policy": "seed data queried instead of M1's responses",
    "direct": "DPO on the paid labels alone, same budget",
    "expert": "the oracle labels everything (ceiling)",
    "shuffled": "paid scores shuffled (floor)",
}


def finished(options: argparse.Namespace, name: str, seed: int) -> str:
    """Finish a variant's run, after the run it shares stages with; return its folder."""
    shared = None if name == BASE else finished(options, BASE, seed)
    config = load_config(options.config, [*options.overrides, *VARIANTS[name], f"seed={seed}"])
    folder = storage.join(config.run_dir, f"{name}-{seed}")
    update = {"name": f"{config.name}-{name}-{seed}", "run_dir": folder, "reuse": shared}
    return finish(config.model_copy(update=update), proxy_dpo)


@dataclass(frozen=True, kw_only=True)
class LabelResult(Result):
    """Result of one run: both policies, and the queries that taught the second."""

    m1: PolicyEvaluation
    m2: PolicyEvaluation
    num_paid: int


def run(options: argparse.Namespace, name: str, seed: int) -> LabelResult:
    """Run a variant; return the measurements of both policies."""
    evaluated = finished_metrics(finished(options, name, seed), EVALUATE)
    m2 = evaluated.policies["m2"]
    return LabelResult(
        difference=measured(m2.difference, "the gain"),
        m1=evaluated.policies["m1"],
        m2=m2,
        num_paid=evaluated.ledger["label"].spent,
    )


def row(name: str, results: list[LabelResult], ceiling: float) -> list[str]:
    gain, between, within = pooled([result.difference for result in results])
    win, win_error = over_seeds([measured(result.m2.win_rate, "the win rate").mean for result in results])
    kl = statistics.mean(measured(result.m2.kl, "KL").mean for result in results)
    num_paid = statistics.mean(result.num_paid for result in results)
    cells = [TITLES[name], f"{num_paid:.0f}"]
    cells += [f"{gain:+.3f}", f"{between:.3f}", f"{within:.3f}", f"{gain / ceiling:.0%}" if ceiling else "-"]
    cells += [f"{win:.1%} +- {win_error:.1%}", f"{kl:.2f}"]
    measures: list[Callable[[PolicyEvaluation], float]] = [
        lambda policy: measured(policy.perplexity, "perplexity"),
        lambda policy: policy.distinct2,
        lambda policy: policy.length,
    ]
    for measure in measures:
        before = statistics.mean(measure(result.m1) for result in results)
        after = statistics.mean(measure(result.m2) for result in results)
        cells.append(f"{before:.3g} -> {after:.3g}")
    return cells


def table(results: Mapping[str, list[LabelResult]]) -> str:
    ceilings = results.get("expert")
    ceiling = pooled([result.difference for result in ceilings])[0] if ceilings else 0.0
    titles = ["labels", "paid", "gain", "SE (seeds)", "SE (prompts)", "of ceiling", "win rate", "KL (nats)"]
    titles += ["perplexity under M1", "distinct-2", "tokens"]
    return markdown(titles, [row(name, done, ceiling) for name, done in results.items() if done])


if __name__ == "__main__":
    study(__doc__, list(VARIANTS), run, table)
