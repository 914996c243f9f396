"""Stage audit_pairs: are the synthetic pairs right? The expert scores both sides of some, kept and refused ones.

What arXiv 2403.19279 leaves open: gamma trades the number of pairs for their quality, and only the number is published.
Costs half of `evaluate.diagnosis_budget`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from rayrl.algorithms.statistics import order_agreement
from rayrl.data.blocks import BlockTable
from rayrl.records import content_id
from rayrl.runs.run import Manifest, Run
from rayrl.stages.labelling.query import expert_of, expert_scores
from rayrl.stages.synthesis.counts import GAMMAS
from rayrl.stages.synthesis.synthesize import STAGE as SYNTHESIZE

STAGE = "audit_pairs"


@dataclass(frozen=True, kw_only=True)
class PossiblePair:
    """A pair that some gamma makes."""

    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    confidence: float | None
    """None where nothing was clustered."""


def audit_pairs(run: Run, oracle: ActorHandle) -> Manifest | None:
    """How often the expert agrees with the pairs, by gamma; None if there are none, or nothing is to be paid."""
    num = (run.config.evaluate.diagnosis_budget - run.config.evaluate.diagnosis_budget // 2) // 2
    synthesized = run.manifest(SYNTHESIZE)
    if not num or synthesized is None or run.config.refresh.method not in ("spg", "reward_pairs", "self_judged"):
        return None
    key = run.key(STAGE, synthesized.key, run.config.evaluate, expert_of(run))
    if done := run.finished(STAGE, key):
        return done
    started = time.monotonic()
    pairs = possible_pairs(run, synthesized)
    pairs = sorted(pairs, key=lambda pair: content_id("audited", str(run.config.seed), pair.prompt_id))[:num]
    texts = [(p.prompt_id, p.prompt, said) for p in pairs for said in (p.chosen, p.rejected)]
    scores = np.array(expert_scores(oracle, texts, describe="asking about synthetic pairs"), float).reshape(-1, 2)
    metrics: dict[str, Any] = audit(scores, [p.confidence for p in pairs]) | {"num_audited": len(pairs)}
    metrics["ledger"] = ray.get(oracle.summary.remote())
    overall = metrics["accuracy"]
    return run.finish(
        STAGE,
        key,
        since=started,
        num_rows=len(pairs),
        metrics=metrics,
        summary=f"of {len(pairs)} possible pairs the expert agrees with "
        + (f"{overall['mean']:.0%} +- {overall['standard_error']:.0%} of {overall['num']}" if overall else "none"),
    )


def possible_pairs(run: Run, synthesized: Manifest) -> list[PossiblePair]:
    """Every pair that some gamma makes: those of the prompts with a low confidence too."""
    num_blocks, clustering = synthesized.metrics["num_blocks"], synthesized.metrics.get("clustering")
    samples = BlockTable(run.folder("samples", "table"), num_blocks)
    name = f"outcomes-{clustering}" if clustering else "outcomes"
    outcomes = BlockTable(run.folder(SYNTHESIZE, synthesized.key, name), num_blocks)
    return [
        PossiblePair(
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            chosen=row["responses"][outcome["chosen"]]["text"],
            rejected=row["responses"][outcome["rejected"]]["text"],
            confidence=outcome["confidence"],
        )
        for block in range(num_blocks)
        for row, outcome in zip(samples.read(block).to_pylist(), outcomes.read(block).to_pylist(), strict=True)
        if outcome["chosen"] is not None
    ]


def audit(scores: np.ndarray, confidences: Sequence[float | None]) -> dict[str, Any]:
    """Agreement of (pairs, 2) scores of chosen and rejected with the pairs: of all, and of those a gamma keeps."""
    said = np.tile([1.0, 0.0], (len(scores), 1))
    overall = order_agreement(scores, said)
    by_gamma = {}
    for gamma in GAMMAS if None not in confidences else ():
        kept = np.array(confidences, float) >= gamma
        agreed = order_agreement(scores[kept], said[kept])
        by_gamma[f"{gamma:.1f}"] = asdict(agreed) if agreed else None
    return {"accuracy": asdict(overall) if overall else None, "accuracy_by_gamma": by_gamma}
