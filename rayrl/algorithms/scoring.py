"""Scores of one response from an evaluator's judgements of it; an abstention (None) is never turned into a number."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped


def expected_score(
    logprobs: Float[np.ndarray, " n"], scores: Shaped[np.ndarray, " n"], *, min_mass: float
) -> float | None:
    """E[s] = sum_s s p(s) / sum_s p(s) over the allowed scores s (G-Eval, arXiv 2303.16634).

    Args:
        logprobs: Log-probability of writing each allowed score, summed over its tokens, nats.
        scores: The allowed scores.
        min_mass: Abstain when the allowed scores together are less probable than this: the evaluator is about to write
            something that is no score.
    """
    highest = logprobs.max()
    if not np.isfinite(highest):
        return None
    # Probabilities relative to the highest: scores that are all improbable do not underflow, and the mean is the same.
    weights = np.exp(logprobs - highest)
    log_mass = np.log(weights.sum()) + highest
    # The floor makes min_mass = 0 a threshold without a logarithm of 0.
    if log_mass < np.log(max(min_mass, np.finfo(float).tiny)):
        return None
    return float(weights @ scores / weights.sum())


def mean_of_samples(scores: Sequence[float | None]) -> float | None:
    """Mean of several sampled judgements, abstentions left out; None if all abstained."""
    given = [score for score in scores if score is not None]
    return sum(given) / len(given) if given else None
