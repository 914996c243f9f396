"""From an evaluator's answers to one score, or to an abstention: None is never turned into a number."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped


def expected_score(
    logprobs: Float[np.ndarray, " n"], scores: Shaped[np.ndarray, " n"], *, min_mass: float
) -> float | None:
    """Probability-weighted mean over the allowed scores (G-Eval, arXiv 2303.16634), renormalised over them.

    Args:
        logprobs: Log-probability of writing each allowed score, summed over its tokens.
        scores: The allowed scores.
        min_mass: Abstain when the allowed scores together are less probable than this: the evaluator means something
            else.
    """
    highest = logprobs.max()
    if not np.isfinite(highest):
        return None
    weights = np.exp(logprobs - highest)
    if np.log(weights.sum()) + highest < np.log(max(min_mass, np.finfo(float).tiny)):
        return None
    return float(weights @ scores / weights.sum())


def mean_of_samples(scores: Sequence[float | None]) -> float | None:
    """Mean of several sampled judgements, abstentions left out; None if all abstained."""
    given = [score for score in scores if score is not None]
    return sum(given) / len(given) if given else None
