"""Stage audit_pairs: agreement of the oracle with the synthetic pairs, at every confidence threshold (gamma).

arXiv 2403.19279 leaves it open: gamma trades the number of pairs for their quality, and only the number is published.
The oracle scores both sides of some pairs, accepted and refused ones, and a pair is right if the chosen side has the
higher score. Costs half of `evaluate.diagnosis_budget`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ray.actor import ActorHandle

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.statistics import order_agreement
from rayrl.data.blocks import BlockTable
from rayrl.records import Sampled, content_id, from_table
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import AuditPairsMetrics, SynthesizeMetrics
from rayrl.runs.stage_table import AUDIT_PAIRS, SAMPLES, SYNTHESIZE
from rayrl.stages.labelling.ask import ledger_counts, oracle_scores
from rayrl.stages.labelling.query import oracle_key
from rayrl.stages.synthesis.outcomes import GAMMAS, Outcome
from rayrl.stages.synthesis.synthetic_pairs import outcomes_table


@dataclass(frozen=True, kw_only=True)
class PossiblePair:
    """A pair that some gamma makes."""

    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    confidence: float | None
    """None where nothing was clustered."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Share of pairs whose chosen side the oracle prefers; pairs that it ties are left out."""

    overall: Estimate | None
    by_gamma: dict[str, Estimate | None]
    """Of the pairs that each gamma keeps; empty where nothing was clustered."""


def audit_pairs(run: Run, oracle: ActorHandle) -> Manifest[AuditPairsMetrics] | None:
    """Measure how often the oracle agrees with the pairs, by gamma; None without pairs or without a budget."""
    synthesized = run.manifest(SYNTHESIZE)
    if synthesized is None or not AUDIT_PAIRS.occurs(run.config, run.round):
        return None
    key = run.key(AUDIT_PAIRS, synthesized.key, run.config.evaluate, oracle_key(run))
    if done := run.finished(AUDIT_PAIRS, key):
        return done
    started = time.monotonic()
    budget = run.config.evaluate.diagnosis_budget
    num_wanted = (budget - budget // 2) // 2  # track_rewards has the other half; a pair costs two scores
    pairs = drawn_pairs(possible_pairs(run, synthesized), num_wanted, run.seed)
    texts: list[tuple[str, str, str]] = []
    for pair in pairs:
        texts.append((pair.prompt_id, pair.prompt, pair.chosen))
        texts.append((pair.prompt_id, pair.prompt, pair.rejected))
    scores = oracle_scores(oracle, texts, AUDIT_PAIRS, describe="asking about synthetic pairs")
    # (pairs, 2); an abstention becomes NaN, which the statistics leave out.
    agreement = measure_agreement(np.array(scores, float).reshape(-1, 2), [pair.confidence for pair in pairs])
    overall = agreement.overall
    result = "none"
    if overall is not None:
        result = f"{overall.mean:.0%} +- {overall.standard_error:.0%} of {overall.num}"
    return run.finish(
        AUDIT_PAIRS,
        key,
        since=started,
        num_rows=len(pairs),
        metrics=AuditPairsMetrics(
            num_audited=len(pairs),
            accuracy=overall,
            accuracy_by_gamma=agreement.by_gamma,
            ledger=ledger_counts(oracle),
        ),
        summary=f"of {len(pairs)} possible pairs the oracle agrees with {result}",
    )


def possible_pairs(run: Run, synthesized: Manifest[SynthesizeMetrics]) -> list[PossiblePair]:
    """Read every pair that some gamma makes: those of the prompts with a low confidence too."""
    num_blocks = synthesized.metrics.num_blocks
    samples = BlockTable(run.folder(SAMPLES, "table"), num_blocks)
    folder = run.folder(SYNTHESIZE, synthesized.key)
    outcomes = outcomes_table(folder, synthesized.metrics.clustering, num_blocks)
    pairs: list[PossiblePair] = []
    for block in range(num_blocks):
        prompts = from_table(samples.read(block), Sampled)
        for sampled, outcome in zip(prompts, from_table(outcomes.read(block), Outcome), strict=True):
            if outcome.chosen is None or outcome.rejected is None:
                continue
            pairs.append(
                PossiblePair(
                    prompt_id=sampled.prompt_id,
                    prompt=sampled.prompt,
                    chosen=sampled.responses[outcome.chosen].text,
                    rejected=sampled.responses[outcome.rejected].text,
                    confidence=outcome.confidence,
                )
            )
    return pairs


def drawn_pairs(pairs: Sequence[PossiblePair], num: int, seed: int) -> list[PossiblePair]:
    """Draw `num` pairs by their prompts' ids and the seed: a larger budget asks about the same ones, and more."""
    return sorted(pairs, key=lambda pair: content_id("audited", str(seed), pair.prompt_id))[:num]


def measure_agreement(scores: np.ndarray, confidences: Sequence[float | None]) -> Agreement:
    """Compare (pairs, 2) scores of chosen and rejected with the pairs' order: of all, and of those each gamma keeps."""
    chosen_first = np.tile([1.0, 0.0], (len(scores), 1))
    by_gamma: dict[str, Estimate | None] = {}
    # The controls have no confidences: no gamma decides about their pairs.
    if None not in confidences:
        for gamma in GAMMAS:
            kept = np.array(confidences, float) >= gamma
            by_gamma[f"{gamma:.1f}"] = order_agreement(scores[kept], chosen_first[kept])
    return Agreement(overall=order_agreement(scores, chosen_first), by_gamma=by_gamma)
