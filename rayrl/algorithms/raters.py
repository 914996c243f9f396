"""Agreement of those who answer the same questions: people among themselves, and a judge with people.

Both coefficients are 1 where all agree and 0 where they agree as often as chance would have it.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

Distances = Callable[[Float[np.ndarray, " n"]], float]
"""Sum of the distances of all ordered pairs of some answers."""


def interval(values: Float[np.ndarray, " n"]) -> float:
    """Distances of scores, the squares of their differences: sum_ij (v_i - v_j)^2 = 2 n sum_i (v_i - mean)^2."""
    return float(2 * len(values) * ((values - values.mean()) ** 2).sum())


def nominal(values: Float[np.ndarray, " n"]) -> float:
    """Distances of kinds, 1 between different ones: n^2 less the squares of how often each kind is there."""
    return float(len(values) ** 2 - (np.unique(values, return_counts=True)[1] ** 2).sum())


def krippendorff_alpha(answers: Sequence[Sequence[float]], distances: Distances = interval) -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's Alpha-Reliability"), for any number of raters a question.

    alpha = 1 - observed / expected disagreement: the mean distance of answers to one question, over that of all answers
    that were given to questions with two or more.

    Args:
        answers: of each question the answers that were given; those with fewer than two tell nothing.
        distances: `interval` for scores, `nominal` for preferences.

    Returns:
        NaN without a question that two have answered, or where all answers are the same.
    """
    units = [np.asarray(unit, float) for unit in answers if len(unit) > 1]
    if not units:
        return math.nan
    values = np.concatenate(units)
    expected = distances(values) / (len(values) - 1)
    if np.ptp(values) == 0:
        return math.nan
    return 1 - sum(distances(unit) / (len(unit) - 1) for unit in units) / expected


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (1960) of two raters who answered the same questions with one of some words.

    Returns:
        NaN without a question, or where chance alone would have them agree on all.
    """
    if not first:
        return math.nan
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    words = {*first, *second}
    by_chance = sum((list(first).count(word) / n) * (list(second).count(word) / n) for word in words)
    return math.nan if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
