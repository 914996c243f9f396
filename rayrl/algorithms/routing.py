"""Routing: keep the evaluator's preference where it is sure, and ask the oracle where it is not.

As ADPO (Ji et al., arXiv 2402.09401) and CoAct (arXiv 2604.17501) do, a pair is asked about if its margin is small. How
large a margin is sure is not set but measured: on prompts that the heads have not seen, in standard deviations of the
heads' differences.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from rayrl.algorithms.heads import NUM_HEADS, fit_heads

NUM_FOLDS = 5
MIN_PAIRS = 20
"""Held-out pairs below which no margin is known to be sure."""
MAX_DRAWN = 100
"""Responses of a fold that are paired with each other, where a prompt has one judged response."""


def sure_margin(margins: Float[np.ndarray, " p"], is_right: Bool[np.ndarray, " p"], confidence: float) -> float:
    """The smallest margin from which on the heads were right as often as asked for; infinity if there is none.

    Args:
        margins: of held-out pairs, at least 0.
        is_right: whether the heads prefer the response that the oracle prefers.
        confidence: the share of pairs with this margin or a larger one that must be right, less one standard error.
    """
    order = np.argsort(-margins, kind="stable")
    num = np.arange(1, len(order) + 1)
    share = np.cumsum(is_right[order]) / num
    enough = np.flatnonzero((share - np.sqrt(share * (1 - share) / num) >= confidence) & (num >= MIN_PAIRS))
    return float(margins[order[enough[-1]]]) if len(enough) else float("inf")


def held_out_pairs(
    vectors: Float[np.ndarray, "n d"],
    scores: Float[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """Margins of pairs of judged responses by heads that have not seen their prompts, and whether these are right.

    Pairs are of one prompt, as those that are routed. Where these are fewer than `MIN_PAIRS`, they are drawn from all
    responses that were held out together. Equal scores make no pair.
    """
    folds = np.unique(groups, return_inverse=True)[1] % NUM_FOLDS
    predicted = np.full((len(scores), num_heads), np.nan)
    for fold in range(min(NUM_FOLDS, int(folds.max(initial=0)) + 1)):
        unseen = folds == fold
        if not unseen.all():
            heads = fit_heads(vectors[~unseen], scores[~unseen], groups[~unseen], num_heads=num_heads, seed=seed)
            predicted[unseen] = heads.scores(vectors[unseen])
    is_known = ~np.isnan(predicted[:, 0])
    first, second = _pairs_of_equal(groups, scores, is_known)
    if len(first) < MIN_PAIRS:
        first, second = _drawn_pairs_of_equal(folds, scores, is_known, seed)
    margins, prefers_first = margins_of(predicted[first] - predicted[second])
    return margins, prefers_first == (scores[first] > scores[second])


def _pairs_of_equal(
    groups: Int64[np.ndarray, " n"], scores: Float[np.ndarray, " n"], is_known: Bool[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (first, second) of all pairs of one group whose scores differ."""
    order = np.flatnonzero(is_known)[np.argsort(groups[is_known], kind="stable")]
    firsts, seconds = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for distance in range(1, len(order)):
        same = np.flatnonzero(groups[order[distance:]] == groups[order[:-distance]])
        if len(same) == 0:
            break
        firsts.append(order[same])
        seconds.append(order[same + distance])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    differ = scores[first] != scores[second]
    return first[differ], second[differ]


def _drawn_pairs_of_equal(
    folds: Int64[np.ndarray, " n"], scores: Float[np.ndarray, " n"], is_known: Bool[np.ndarray, " n"], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pairs that were held out together, some of them drawn where they are many."""
    rng = np.random.default_rng(seed)
    firsts, seconds = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for fold in range(NUM_FOLDS):
        rows = rng.permutation(np.flatnonzero((folds == fold) & is_known))[:MAX_DRAWN]
        first, second = np.triu_indices(len(rows), 1)
        firsts.append(rows[first])
        seconds.append(rows[second])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    differ = scores[first] != scores[second]
    return first[differ], second[differ]


def margins_of(differences: Float[np.ndarray, "p m"]) -> tuple[Float64[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """|mean_m d_m| / std_m d_m, and whether the mean prefers the first response."""
    mean, spread = differences.mean(1, dtype=np.float64), differences.std(1, dtype=np.float64, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.where(mean == 0, 0.0, np.abs(mean) / spread)
    return margins, mean > 0


def in_doubt(doubts: Sequence[float], least: float) -> list[int]:
    """Places of the answers that are in doubt, those of the largest doubt first, equal ones in order.

    Args:
        doubts: standard deviations of what the judges of an answer say; infinity where they say nothing.
        least: from which on an answer is in doubt.
    """
    return sorted((place for place, doubt in enumerate(doubts) if doubt >= least), key=lambda place: -doubts[place])
