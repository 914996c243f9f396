"""Outcomes of synthetic preference generation: for each prompt a pair or the reason why there is none; their counts.

An outcome holds the pair that a prompt gives at any threshold, and whether this run's threshold (gamma) accepts it. So
that tables never pass through the driver, each block is reduced to histograms, which are added up there.

Clusters and scores are given: nothing here runs a model.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pyarrow as pa

from rayrl.algorithms.pairing import best_worst
from rayrl.algorithms.synthesis import synthetic_pair
from rayrl.records import Sampled, content_id, from_table

EMPTY = -1
"""Cluster of a prompt's empty samples. They count towards its size, and take part in no pair."""
GAMMAS = [tenth / 10 for tenth in range(11)]
"""Thresholds at which the possible pairs are counted."""
REASONS = ("accepted", "one_cluster", "low_confidence", "abstained", "tied")
"""Values of `Outcome.reason`."""

Scores = Sequence[float | None]
"""A reward for each of a prompt's responses; None where the reward abstains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One prompt: a row of the outcomes table."""

    prompt_id: str
    reason: str
    """"accepted", or why there is no pair: "one_cluster", "low_confidence", "abstained" (no response with a reward for
    one of the two sides) or "tied" (controls only)."""
    chosen: int | None
    """Index among the prompt's responses; None where no gamma makes a pair. A pair that this run's gamma refuses is
    kept here: the oracle may be asked about the pairs of other gammas."""
    rejected: int | None
    confidence: float | None
    """Share of all samples that the largest cluster holds; None if nothing was clustered."""
    cluster_sizes: list[int]
    """Samples in each cluster, repeated and empty ones included."""


def synthesize_outcome(
    sampled: Sampled, clusters: Sequence[int], scores: Scores, *, gamma: float, seed: int
) -> Outcome:
    """Decide about one prompt by SPG. The draw of the rejected response depends on seed and prompt only.

    Args:
        sampled: the prompt's responses.
        clusters: the cluster of each of them.
        scores: the reward of each of them.
        gamma: least confidence that makes a pair.
        seed: the run's.
    """
    # SPG counts samples: a text sampled three times is three members of its cluster.
    sample_clusters: list[int] = []
    sample_scores: list[float | None] = []
    sample_responses: list[int] = []
    for index, response in enumerate(sampled.responses):
        sample_clusters += [clusters[index]] * response.num_samples
        sample_scores += [scores[index]] * response.num_samples
        sample_responses += [index] * response.num_samples
    sample_clusters += [EMPTY] * sampled.num_empty
    sample_scores += [None] * sampled.num_empty
    if not sample_clusters:
        return _unclustered(sampled.prompt_id, "abstained", None)

    # At threshold 0, so that the pairs of all thresholds are known; this run's own is applied below.
    rng = np.random.default_rng(_rejection_seed(seed, sampled.prompt_id))
    possible = synthetic_pair(sample_clusters, sample_scores, 0.0, rng)
    chosen = rejected = None
    if possible.chosen is not None and possible.rejected is not None:
        chosen, rejected = sample_responses[possible.chosen], sample_responses[possible.rejected]
    if possible.num_clusters == 1:
        reason = "one_cluster"
    elif possible.confidence < gamma:
        reason = "low_confidence"
    elif chosen is None:
        reason = "abstained"
    else:
        reason = "accepted"
    return Outcome(
        prompt_id=sampled.prompt_id,
        reason=reason,
        chosen=chosen,
        rejected=rejected,
        confidence=possible.confidence,
        cluster_sizes=sorted(Counter(sample_clusters).values(), reverse=True),
    )


def best_worst_outcome(prompt_id: str, scores: Scores) -> Outcome:
    """Decide about one prompt by the controls' rule: the best response against the worst, whatever they mean."""
    pairs = best_worst(scores, 0.0)
    if pairs:
        return _unclustered(prompt_id, "accepted", pairs[0])
    num_scored = sum(score is not None for score in scores)
    # A prompt whose samples are all the same text has no abstention to blame: its best is its worst.
    is_single_response = num_scored == len(scores) == 1
    is_tied = num_scored > 1 or is_single_response
    return _unclustered(prompt_id, "tied" if is_tied else "abstained", None)


def _unclustered(prompt_id: str, reason: str, pair: tuple[int, int] | None) -> Outcome:
    chosen, rejected = pair or (None, None)
    return Outcome(
        prompt_id=prompt_id,
        reason=reason,
        chosen=chosen,
        rejected=rejected,
        confidence=None,
        cluster_sizes=[],
    )


def _rejection_seed(seed: int, prompt_id: str) -> int:
    return int(content_id("rejected", str(seed), prompt_id), 16)  # 64 bits, where a run's other seeds have 63


@dataclass(frozen=True, kw_only=True)
class OutcomeCounts:
    """Counts of all of a run's outcomes. Numbers are keys as text, in their order; what did not occur is left out."""

    outcomes: dict[str, int]
    """Prompts by reason."""
    confidences: dict[str, int]
    """Prompts by the upper edge of the bin, a tenth wide, that holds their confidence."""
    cluster_sizes: dict[str, int]
    """Clusters by the number of their samples."""
    num_clusters: dict[str, int]
    """Prompts by the number of their clusters."""
    pairs_by_gamma: dict[str, int]
    """Pairs that each of `GAMMAS` would accept."""

    @property
    def num_prompts(self) -> int:
        return sum(self.outcomes.values())

    @property
    def num_pairs(self) -> int:
        return self.outcomes.get("accepted", 0)

    @property
    def acceptance_rate(self) -> float:
        """Share of the prompts that give a pair."""
        return self.num_pairs / max(1, self.num_prompts)


def count_outcomes(block: pa.Table) -> dict[str, list[int]]:
    """Count a block of outcomes: a histogram of each kind, whose positions `add_counts` names.

    Histograms are plain lists, not dictionaries: Arrow carries lists of any length, while a dictionary would become a
    struct, whose fields would have to be the same in every block.
    """
    reasons: list[int] = []
    confidence_bins: list[int] = []
    sizes: list[int] = []
    num_clusters: list[int] = []
    possible: list[float] = []
    for outcome in from_table(block, Outcome):
        reasons.append(REASONS.index(outcome.reason))
        if outcome.confidence is None:
            continue  # nothing was clustered
        confidence_bins.append(tenths(outcome.confidence))
        sizes += outcome.cluster_sizes
        num_clusters.append(len(outcome.cluster_sizes))
        if outcome.chosen is not None:
            possible.append(outcome.confidence)
    return {
        "reasons": _histogram(reasons, len(REASONS)),
        "confidences": _histogram(confidence_bins),
        "cluster_sizes": _histogram(sizes),
        "num_clusters": _histogram(num_clusters),
        "pairs_by_gamma": [sum(confidence >= gamma for confidence in possible) for gamma in GAMMAS],
    }


def _histogram(values: Sequence[int], length: int = 1) -> list[int]:
    """Count small integers; `length` numbers or more."""
    # Never an empty list: Arrow would not know the type of its items, and could not join it to another block's.
    return np.bincount(np.array(values, np.int64), minlength=length).tolist()


def tenths(confidence: float) -> int:
    """Number of a confidence's bin: bin i is ((i - 1) / 10, i / 10]."""
    # k / 10 as a float times 10 may come out a rounding error above k, and belongs to bin k.
    return math.ceil(confidence * 10 - 1e-9)


def add_counts(blocks: Sequence[dict[str, list[int]]]) -> OutcomeCounts:
    """Add up the histograms of all blocks, and name their positions."""

    def total(name: str) -> list[int]:
        histograms = [block[name] for block in blocks]
        return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]

    def by_number(name: str) -> dict[str, int]:
        return {str(number): count for number, count in enumerate(total(name)) if count}

    return OutcomeCounts(
        outcomes={reason: count for reason, count in zip(REASONS, total("reasons"), strict=True) if count},
        confidences={f"{bin_ / 10:.1f}": count for bin_, count in enumerate(total("confidences")) if count},
        cluster_sizes=by_number("cluster_sizes"),
        num_clusters=by_number("num_clusters"),
        pairs_by_gamma={f"{gamma:.1f}": n for gamma, n in zip(GAMMAS, total("pairs_by_gamma"), strict=True)},
    )
