"""Routing: keep the evaluator's preference where it is sure, and ask the oracle where it is not.

As ADPO (Ji et al., arXiv 2402.09401) and CoAct (arXiv 2604.17501) do, a pair is asked about if its margin is small. How
large a margin is sure is not set but measured: on prompts that the heads have not seen, in standard deviations of the
heads' differences.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from rayrl.algorithms.heads import fit_heads

NUM_FOLDS = 5
MIN_PAIRS = 20
"""Held-out pairs below which no margin is known to be sure."""


def sure_margin(margins: Float[np.ndarray, " p"], is_right: Bool[np.ndarray, " p"], confidence: float) -> float:
    """The smallest margin from which on the heads were right as often as asked for; infinity if there is none.

    Args:
        margins: of held-out pairs, at least 0.
        is_right: whether the heads prefer the response that the oracle prefers.
        confidence: the share of pairs with this margin or a larger one that must be right.
    """
    order = np.argsort(-margins, kind="stable")
    num = np.arange(1, len(order) + 1)
    share = np.cumsum(is_right[order]) / num
    enough = np.flatnonzero((share >= confidence) & (num >= MIN_PAIRS))
    return float(margins[order[enough[-1]]]) if len(enough) else float("inf")


def held_out_pairs(
    vectors: Float[np.ndarray, "n d"],
    scores: Float[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """Margins of pairs of judged responses by heads that have not seen their prompts, and whether these are right.

    Pairs are of one prompt, as those that are routed. Where these are fewer than `MIN_PAIRS`, they are of all responses
    that were held out together. Equal scores make no pair.
    """
    folds = np.unique(groups, return_inverse=True)[1] % NUM_FOLDS
    within: list[tuple[np.ndarray, np.ndarray]] = []
    across: list[tuple[np.ndarray, np.ndarray]] = []
    for fold in range(NUM_FOLDS):
        unseen = folds == fold
        if not unseen.any() or unseen.all():
            continue
        predicted = fit_heads(vectors[~unseen], scores[~unseen], groups[~unseen], seed=seed).scores(vectors[unseen])
        first, second = np.triu_indices(int(unseen.sum()), 1)
        true = scores[unseen][first] - scores[unseen][second]
        margins, prefers_first = margins_of(predicted[first] - predicted[second])
        differ = true != 0
        same = groups[unseen][first] == groups[unseen][second]
        is_right = prefers_first == (true > 0)
        within.append((margins[differ & same], is_right[differ & same]))
        across.append((margins[differ], is_right[differ]))
    chosen = within if sum(len(margins) for margins, _ in within) >= MIN_PAIRS else across
    if not chosen:
        return np.empty(0), np.empty(0, np.bool_)
    return np.concatenate([margins for margins, _ in chosen]), np.concatenate([right for _, right in chosen])


def margins_of(differences: Float[np.ndarray, "p m"]) -> tuple[Float64[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """|mean_m d_m| / std_m d_m, and whether the mean prefers the first response."""
    mean, spread = differences.mean(1, dtype=np.float64), differences.std(1, dtype=np.float64, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.where(mean == 0, 0.0, np.abs(mean) / spread)
    return margins, mean > 0
