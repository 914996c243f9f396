"""Pairings of one prompt's responses: from their scores to (chosen, rejected) pairs of indices.

A score of None is an abstention: the response takes part in no pair. Ties, that is differences of `min_margin` or less,
are dropped, as in Self-Rewarding Language Models (arXiv 2401.10020). This module knows neither texts nor tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PAIRS_PER_QUERY = 9
"""Preference pairs that a paid query buys in arXiv 2407.02119; plan and report warn of fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """A way to pair the responses of one prompt."""

    pairs: Callable[[Sequence[float | None], float], list[tuple[int, int]]]
    """Called as `pairs(scores, min_margin)`: the (chosen, rejected) pairs of one prompt."""
    num_pairs: Callable[[int], int]
    """Called as `num_pairs(k)`: the pairs of k responses when no score is missing and no two are tied. There are never
    more, so a plan can announce this number."""


def best_worst(scores: Sequence[float | None], min_margin: float) -> list[tuple[int, int]]:
    """Pair the best response with the worst: one (chosen, rejected) pair, or none; the smaller index wins ties."""
    scored = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not scored:
        return []
    # Negated indices, because `max` would otherwise prefer the larger index among equal scores.
    best, negated_index = max((score, -index) for score, index in scored)
    worst, rejected = min(scored)
    return [(-negated_index, rejected)] if best - worst > min_margin else []


def margin_pairs(scores: Sequence[float | None], min_margin: float) -> list[tuple[int, int]]:
    """All (chosen, rejected) pairs whose scores differ by more than `min_margin`, sorted by index."""
    pairs: list[tuple[int, int]] = []
    for chosen, high in enumerate(scores):
        for rejected, low in enumerate(scores):
            if high is None or low is None:
                continue
            # Both conditions: a negative `min_margin` must not turn a pair around.
            if high > low and high - low > min_margin:
                pairs.append((chosen, rejected))
    return pairs


PAIRINGS: dict[str, Pairing] = {
    "best_worst": Pairing(pairs=best_worst, num_pairs=lambda k: min(1, k // 2)),
    "margin": Pairing(pairs=margin_pairs, num_pairs=lambda k: k * (k - 1) // 2),
}
"""Values of `pseudo_label.pairing`. Config, plan and pseudo-labelling learn of a pairing from its entry."""


def num_pairs_planned(pairing: str, num_prompts: int, k: int) -> int:
    """Bound the pairs of `num_prompts` prompts with k responses each: reached when there are no ties."""
    return num_prompts * PAIRINGS[pairing].num_pairs(k)
