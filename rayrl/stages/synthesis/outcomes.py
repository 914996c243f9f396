"""What becomes of one prompt in synthetic preference generation: a pair, or the reason why there is none."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrl.algorithms.pairing import best_worst
from rayrl.algorithms.synthesis import synthetic_pair
from rayrl.records import content_id

EMPTY = -1
"""The cluster of the samples that say nothing. They count, and take part in no pair."""

Scores = Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One prompt: a row of the outcomes table."""

    prompt_id: str
    reason: str
    """"accepted", or why there is no pair: "one_cluster", "low_confidence", "abstained" (no response with a reward for
    one of the two sides) or "tied" (controls only)."""
    chosen: int | None
    """Index among the prompt's responses; None where no gamma makes a pair. One that is refused is kept: the expert may
    be asked what another gamma would have made of it."""
    rejected: int | None
    confidence: float | None
    """Share of all samples that the largest cluster holds; None if nothing was clustered."""
    cluster_sizes: list[int]
    """Samples in each cluster, repeated and empty ones included."""


def synthesize_outcome(
    row: dict[str, Any], clusters: Sequence[int], scores: Scores, *, gamma: float, seed: int
) -> Outcome:
    """SPG on one row of the responses table; the draw of the rejected response depends on seed and prompt only.

    Args:
        row: a `Sampled`.
        clusters: of each of its responses.
        scores: the reward of each of its responses.
        gamma: least confidence that makes a pair.
        seed: of the run.
    """
    counts = [response["num_samples"] for response in row["responses"]]
    ids = [*np.repeat(np.array(clusters, np.int64), counts).tolist(), *[EMPTY] * row["num_empty"]]
    index = np.repeat(np.arange(len(counts)), counts).tolist()
    rewards = [*(scores[i] for i in index), *[None] * row["num_empty"]]
    if not ids:
        return _without_clusters(row, "abstained", None)

    possible = synthetic_pair(ids, rewards, 0.0, np.random.default_rng(_stream(seed, row["prompt_id"])))
    pair = None
    if possible.chosen is not None and possible.rejected is not None:
        pair = index[possible.chosen], index[possible.rejected]
    if possible.num_clusters == 1:
        reason = "one_cluster"
    elif possible.confidence < gamma:
        reason = "low_confidence"
    else:
        reason = "accepted" if pair else "abstained"
    return Outcome(
        prompt_id=row["prompt_id"],
        reason=reason,
        chosen=pair[0] if pair else None,
        rejected=pair[1] if pair else None,
        confidence=possible.confidence,
        cluster_sizes=sorted(Counter(ids).values(), reverse=True),
    )


def best_worst_outcome(row: dict[str, Any], scores: Scores) -> Outcome:
    """The controls: the best response against the worst, whatever they mean."""
    pairs = best_worst(scores, 0.0)
    if pairs:
        return _without_clusters(row, "accepted", pairs[0])
    num_scored = sum(score is not None for score in scores)
    is_tied = num_scored > 1 or num_scored == len(scores) == 1
    return _without_clusters(row, "tied" if is_tied else "abstained", None)


def _without_clusters(row: dict[str, Any], reason: str, pair: tuple[int, int] | None) -> Outcome:
    chosen, rejected = pair or (None, None)
    return Outcome(
        prompt_id=row["prompt_id"],
        reason=reason,
        chosen=chosen,
        rejected=rejected,
        confidence=None,
        cluster_sizes=[],
    )


def _stream(seed: int, prompt_id: str) -> int:
    return int(content_id("rejected", str(seed), prompt_id), 16)
