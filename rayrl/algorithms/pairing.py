"""From scores within one prompt to preference pairs (indices only).

A score of None is an abstention: it takes part in no pair. Ties, that is differences of `min_margin` or less, are
dropped, as in Self-Rewarding Language Models (arXiv 2401.10020).
"""

from collections.abc import Sequence
from typing import Literal


def best_worst(scores: Sequence[float | None], min_margin: float) -> list[tuple[int, int]]:
    """The best against the worst response: one (chosen, rejected) pair, or none; the smaller index wins ties."""
    scored = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not scored:
        return []
    best, chosen = max(scored, key=lambda item: (item[0], -item[1]))
    worst, rejected = min(scored)
    return [(chosen, rejected)] if best - worst > min_margin else []


def margin_pairs(scores: Sequence[float | None], min_margin: float) -> list[tuple[int, int]]:
    """All (chosen, rejected) pairs whose scores differ by more than `min_margin`, sorted by index."""
    scored = [(index, score) for index, score in enumerate(scores) if score is not None]
    return [(i, j) for i, high in scored for j, low in scored if high > low and high - low > min_margin]


def num_pairs_planned(pairing: Literal["best_worst", "margin"], num_prompts: int, k: int) -> int:
    """Upper bound on the pairs of `num_prompts` prompts with k responses each: as many as there are without ties."""
    per_prompt = min(1, k // 2) if pairing == "best_worst" else k * (k - 1) // 2
    return num_prompts * per_prompt
