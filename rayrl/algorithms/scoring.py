"""Scores of one response from an evaluator's judgements of it; an abstention (None) is never turned into a number."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Shaped


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
    weights = _weights(logprobs, min_mass)
    return None if weights is None else float(weights @ scores / weights.sum())


def mean_of_samples(scores: Sequence[float | None]) -> float | None:
    """Mean of several sampled judgements, abstentions left out; None if all abstained."""
    given = [score for score in scores if score is not None]
    return sum(given) / len(given) if given else None


def predictive_entropy(samples: Sequence[Float[np.ndarray, " n"]], *, min_mass: float) -> float | None:
    """H(p), in nats, p(s) = mean_r p(s | r) over sampled judgements r: what the evaluator leaves open about a score.

    Between 0 and log n. None where all judgements abstain.

    Args:
        samples: Log-probabilities of the allowed scores by each judgement, as `expected_score` reads them.
        min_mass: A judgement abstains as in `expected_score`, and is left out.
    """
    given = [
        weights / weights.sum() for weights in (_weights(each, min_mass) for each in samples) if weights is not None
    ]
    return float(entropy(np.mean(given, axis=0))) if given else None


def entropy(p: Float64[np.ndarray, "*n c"]) -> Float64[np.ndarray, "*n"]:
    """-sum_c p_c log p_c."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(p > 0, p * np.log(p), 0).sum(-1)


def _weights(logprobs: Float[np.ndarray, " n"], min_mass: float) -> Float64[np.ndarray, " n"] | None:
    """Return probabilities in proportion; None where all together are less probable than `min_mass`."""
    highest = logprobs.max()
    if not np.isfinite(highest):
        return None
    # Probabilities relative to the highest: scores that are all improbable do not underflow, and the mean is the same.
    weights = np.exp(logprobs - highest)
    log_mass = np.log(weights.sum()) + highest
    # The floor makes min_mass = 0 a threshold without a logarithm of 0.
    return None if log_mass < np.log(max(min_mass, np.finfo(float).tiny)) else weights
