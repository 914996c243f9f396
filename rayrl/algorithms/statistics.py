"""What a run is judged by: differences, win rates, correlations, diversity. Every comparison carries a standard error.

Standard errors here are over prompts. Seeds, the judge's own noise and the choice of prompts are more: several runs
show them, no formula here does.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Shaped
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

RIDGE = 1e-3
"""Keeps the length regression finite when one side wins everything; moves no ordinary estimate visibly."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its uncertainty."""

    mean: float
    standard_error: float
    """Infinite for a single observation: nothing is known about its spread."""
    num: int
    """Observations behind it."""


def paired_difference(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Estimate:
    """Mean of a - b over pairs, and its standard error."""
    return _mean(np.subtract(a, b, dtype=np.float64))


def win_rate(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Estimate:
    """Share of pairs where a beats b; a tie is half a win."""
    return _mean((np.sign(np.subtract(a, b, dtype=np.float64)) + 1) / 2)


def order_agreement(expert: Float[np.ndarray, "n 2"], predicted: Float[np.ndarray, "n 2"]) -> Estimate | None:
    """Share of pairs that a prediction orders as the expert does, a tie of the prediction half of one.

    Pairs the expert ties, and pairs with a NaN, say nothing and are left out. None if none is left.
    """
    theirs, ours = (
        np.sign(np.subtract(scores[:, 0], scores[:, 1], dtype=np.float64)) for scores in (expert, predicted)
    )
    kept = (theirs != 0) & ~np.isnan(theirs) & ~np.isnan(ours)
    return _mean((theirs * ours)[kept] / 2 + 0.5) if kept.any() else None


def length_controlled_win_rate(
    a_wins: Shaped[np.ndarray, " n"], a_lengths: Shaped[np.ndarray, " n"], b_lengths: Shaped[np.ndarray, " n"]
) -> Estimate:
    """The win rate of a against b had both been equally long (AlpacaEval 2, arXiv 2404.04475).

    A logistic regression, logit p = c + w tanh(dlen / std(dlen)), fitted to the (possibly fractional) wins and read at
    dlen = 0. Unlike AlpacaEval 2 it has no instruction-difficulty term, which needs many models' answers, no L1 penalty
    and no added baselines. The standard error is the delta method's on the sandwich covariance, std(dlen) held fixed.
    """
    wins = np.asarray(a_wins, np.float64)
    if not len(wins):
        raise ValueError("a win rate needs at least one pair, got none")
    longer = np.subtract(a_lengths, b_lengths, dtype=np.float64)
    spread = longer.std()
    design = np.stack([np.ones(len(wins)), np.tanh(longer / spread) if spread else np.zeros(len(wins))], 1)

    def objective(weights: Float64[np.ndarray, " 2"]) -> tuple[float, Float64[np.ndarray, " 2"]]:
        logits = design @ weights
        loss = np.logaddexp(0, logits) - wins * logits
        return loss.sum() + RIDGE / 2 * weights @ weights, design.T @ (expit(logits) - wins) + RIDGE * weights

    weights = minimize(objective, np.zeros(2), jac=True, method="BFGS").x
    predicted = expit(design @ weights)
    bread = np.linalg.inv((design.T * (predicted * (1 - predicted))) @ design + RIDGE * np.eye(2))
    scores = design * (wins - predicted)[:, None]
    rate = float(expit(weights[0]))
    error = rate * (1 - rate) * math.sqrt((bread @ scores.T @ scores @ bread)[0, 0])
    return Estimate(rate, error if len(wins) > 1 else math.inf, len(wins))


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> Estimate | None:
    """Spearman's rank correlation, ties at their mean rank.

    The standard error is (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)), Bonett and Wright 2000 carried from Fisher's z to r.
    None where a correlation is undefined: fewer than four points, or a side that is constant.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rho = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
    return Estimate(rho, (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3)), len(x))


def accuracy_within(
    predicted: Shaped[np.ndarray, " n"], expert: Shaped[np.ndarray, " n"], tolerance: float = 1.0
) -> float:
    """Share of predictions at most `tolerance` from the expert's score."""
    return float(np.mean(np.abs(np.subtract(predicted, expert, dtype=np.float64)) <= tolerance))


def calibration_table(
    predicted: Shaped[np.ndarray, " n"], expert: Shaped[np.ndarray, " n"], num_bins: int
) -> list[dict[str, float | int]]:
    """Mean expert score per equally wide bin of predicted score; empty bins are left out."""
    edges = np.linspace(np.min(predicted), np.max(predicted), num_bins + 1)
    which = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, num_bins - 1)
    return [
        {
            "low": float(edges[bin_]),
            "high": float(edges[bin_ + 1]),
            "num": int((which == bin_).sum()),
            "mean_predicted": float(np.mean(predicted[which == bin_])),
            "mean_expert": float(np.mean(expert[which == bin_])),
        }
        for bin_ in np.unique(which)
    ]


def expected_calibration_error(
    confidences: Float[np.ndarray, " n"], correct: Shaped[np.ndarray, " n"], num_bins: int = 10
) -> float:
    """How far confidence is from accuracy: |mean confidence - accuracy| per bin, weighted by the bins' sizes.

    Bins of equal width over [0, 1], the left edge in the bin (arXiv 1706.04599, Eq. 3). `correct` may be fractional.
    Few answers in a bin are far from their confidence by chance: the value is biased upwards in small samples.

    Raises:
        ValueError: there is no answer.
    """
    if not len(confidences):
        raise ValueError("a calibration error needs at least one answer, got none")
    bins = np.clip((np.asarray(confidences, np.float64) * num_bins).astype(int), 0, num_bins - 1)
    gaps = np.bincount(bins, np.subtract(confidences, correct, dtype=np.float64), num_bins)
    return float(np.abs(gaps).sum() / len(bins))


def kl_estimate(logprobs_policy: Float[np.ndarray, " n"], logprobs_reference: Float[np.ndarray, " n"]) -> Estimate:
    """KL(policy, reference) per sequence, nats, from sequences the policy sampled at temperature 1.

    The unbiased estimator k1, mean of log pi - log pi_ref: it may come out negative when the KL is small.
    """
    return paired_difference(logprobs_policy, logprobs_reference)


def best_of_n_kl(n: int) -> float:
    """KL(best of n, policy) per sequence, nats: log n - (n - 1) / n, an upper bound (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def perplexity(logprobs: Float[np.ndarray, " n"], num_tokens: Shaped[np.ndarray, " n"]) -> float:
    """Per-token perplexity of sequences with these summed log-probabilities (nats); infinite beyond float64."""
    exponent = -float(np.sum(logprobs)) / float(np.sum(num_tokens))
    return math.exp(exponent) if exponent < 700 else math.inf


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all texts, words split at blanks (arXiv 1510.03055); 0 if there are none."""
    grams = Counter(gram for text in texts for gram in _ngrams(text.split(), n).elements())
    return len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[str], *, max_n: int = 4, num_sampled: int = 200, seed: int = 0) -> float:
    """Mean BLEU of each text against all others (arXiv 1802.01886): 1 means all alike, near 0 all different.

    Words are split at blanks. More than `num_sampled` texts are sampled down first: the value depends on how many texts
    there are, so compare equal numbers. An n-gram order without a match counts as half a match, to keep short texts
    comparable. 0 for fewer than two texts.
    """
    words = [text.split() for text in texts]
    if len(words) > num_sampled:
        words = [words[i] for i in np.random.default_rng(seed).choice(len(words), num_sampled, replace=False)]
    if len(words) < 2:
        return 0.0
    logs = np.zeros(len(words))
    for n in range(1, max_n + 1):
        grams = [_ngrams(text, n) for text in words]
        first, second = Counter(), Counter()  # the two largest counts of every n-gram in any one text
        for gram, count in (item for text in grams for item in text.items()):
            second[gram] = max(second[gram], min(count, first[gram]))
            first[gram] = max(first[gram], count)
        for i, text in enumerate(grams):
            # The others' largest count: `second` where this text alone holds the largest, else `first`.
            matches = sum(min(c, second[g] if c == first[g] else first[g]) for g, c in text.items())
            logs[i] += math.log(max(matches, 0.5) / max(text.total(), 1)) / max_n
    lengths = np.array([len(text) for text in words])
    return float(np.mean([math.exp(min(log, 0)) * _brevity(lengths, i) for i, log in enumerate(logs)]))


def _brevity(lengths: Shaped[np.ndarray, " n"], i: int) -> float:
    """BLEU's penalty for a text shorter than the other text nearest in length (the shorter of two as near)."""
    others = np.sort(np.delete(lengths, i))
    nearest = others[np.argmin(np.abs(others - lengths[i]))]
    return min(1.0, math.exp(1 - nearest / lengths[i])) if lengths[i] else 0.0


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _mean(values: Float64[np.ndarray, " n"]) -> Estimate:
    if not len(values):
        raise ValueError("an estimate needs at least one observation, got none")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(np.mean(values)), error, len(values))
