"""Agreement of those who answer the same questions: people among themselves, and a judge with people.

Both coefficients are 1 where all agree and 0 where they agree as often as chance would have it.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

Distance = Callable[[Float[np.ndarray, "a b"]], Float[np.ndarray, "a b"]]
"""How far two answers are apart, given the difference of their values."""


def interval(difference: Float[np.ndarray, "a b"]) -> Float[np.ndarray, "a b"]:
    """Distance of scores: the square of their difference."""
    return difference**2


def nominal(difference: Float[np.ndarray, "a b"]) -> Float[np.ndarray, "a b"]:
    """Distance of kinds: 1 between different ones."""
    return (difference != 0).astype(float)


def krippendorff_alpha(answers: Sequence[Sequence[float]], distance: Distance = interval) -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's Alpha-Reliability"), for any number of raters a question.

    alpha = 1 - observed / expected disagreement: the mean distance of answers to one question, over that of all answers
    that were given to questions with two or more.

    Args:
        answers: of each question the answers that were given; those with fewer than two tell nothing.
        distance: `interval` for scores, `nominal` for preferences.

    Returns:
        NaN without a question that two have answered, or where all answers are the same.
    """
    units = [np.asarray(unit, float) for unit in answers if len(unit) > 1]
    if not units:
        return math.nan
    values = np.concatenate(units)
    expected = distance(np.subtract.outer(values, values)).sum() / (len(values) - 1)
    if expected == 0:
        return math.nan
    observed = sum(distance(np.subtract.outer(unit, unit)).sum() / (len(unit) - 1) for unit in units)
    return float(1 - observed / expected)


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
