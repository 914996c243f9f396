"""Statistics of a run's evaluation: differences, win rates, correlations, calibration, diversity.

Every comparison of policies carries a standard error. Standard errors here are over prompts. Seeds, the judge's own
noise and the choice of prompts add to them: several runs show that, no formula here does.
"""
# scipy has no types: its results, and arrays computed from them, are unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Shaped
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from rayrl.algorithms.estimate import CalibrationBin, Estimate

RIDGE = 1e-3
"""Keeps the length regression finite when one side wins everything; moves no ordinary estimate visibly."""
LARGEST_EXPONENT = 700
"""`math.exp` overflows a little above it."""

Ngram = tuple[str, ...]


def paired_difference(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Estimate:
    """Mean of a - b over pairs, and its standard error."""
    return _mean(np.subtract(a, b, dtype=np.float64))


def win_rate(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Estimate:
    """Share of pairs where a beats b; a tie is half a win."""
    signs = np.sign(np.subtract(a, b, dtype=np.float64))  # 1 a wins, 0 tie, -1 b wins
    return _mean((signs + 1) / 2)


def order_agreement(oracle: Float[np.ndarray, "n 2"], predicted: Float[np.ndarray, "n 2"]) -> Estimate | None:
    """Share of pairs that a prediction orders as the oracle does, a tie of the prediction half of one.

    Pairs that the oracle ties, and pairs with a NaN, have no order and are left out. None if none is left.
    """
    oracle_order = np.sign(np.subtract(oracle[:, 0], oracle[:, 1], dtype=np.float64))
    predicted_order = np.sign(np.subtract(predicted[:, 0], predicted[:, 1], dtype=np.float64))
    is_ordered = (oracle_order != 0) & ~np.isnan(oracle_order) & ~np.isnan(predicted_order)
    if not is_ordered.any():
        return None
    agreement = (oracle_order * predicted_order)[is_ordered]  # 1 same order, 0 tie, -1 opposite order
    return _mean(agreement / 2 + 0.5)


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
    length_difference = np.subtract(a_lengths, b_lengths, dtype=np.float64)
    spread = length_difference.std()
    # With equal differences everywhere the length explains nothing.
    length_term = np.tanh(length_difference / spread) if spread else np.zeros(len(wins))
    design = np.stack([np.ones(len(wins)), length_term], 1)  # (n, 2), for the weights (c, w)

    def objective(weights: Float64[np.ndarray, " 2"]) -> tuple[float, Float64[np.ndarray, " 2"]]:
        """The penalised negative log-likelihood, and its gradient."""
        logits = design @ weights
        negative_log_likelihoods = np.logaddexp(0, logits) - wins * logits
        penalty = RIDGE / 2 * weights @ weights
        gradient = design.T @ (expit(logits) - wins) + RIDGE * weights
        return negative_log_likelihoods.sum() + penalty, gradient

    weights = minimize(objective, np.zeros(2), jac=True, method="BFGS").x
    predicted = expit(design @ weights)

    # The sandwich: H^-1 (sum_i g_i g_i^T) H^-1 with the Hessian H and each pair's gradient g_i.
    hessian = (design.T * (predicted * (1 - predicted))) @ design + RIDGE * np.eye(2)
    bread = np.linalg.inv(hessian)
    gradients = design * (wins - predicted)[:, None]  # (n, 2)
    covariance = bread @ gradients.T @ gradients @ bread

    # The delta method: the rate is sigma(c), and d sigma / dc = sigma (1 - sigma).
    rate = float(expit(weights[0]))
    error = rate * (1 - rate) * math.sqrt(covariance[0, 0])
    return Estimate(rate, error if len(wins) > 1 else math.inf, len(wins))


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> Estimate | None:
    """Spearman's rank correlation, ties at their mean rank.

    The standard error is (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)), Bonett and Wright 2000 carried from Fisher's z to r.
    None where a correlation is undefined: fewer than four points, or a side that is constant.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rho = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
    error_of_z = math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return Estimate(rho, (1 - rho**2) * error_of_z, len(x))


def accuracy_within(
    predicted: Shaped[np.ndarray, " n"], oracle: Shaped[np.ndarray, " n"], tolerance: float = 1.0
) -> float:
    """Share of predictions at most `tolerance` from the oracle's score."""
    errors = np.abs(np.subtract(predicted, oracle, dtype=np.float64))
    return float(np.mean(errors <= tolerance))


def calibration_table(
    predicted: Shaped[np.ndarray, " n"], oracle: Shaped[np.ndarray, " n"], num_bins: int
) -> list[CalibrationBin]:
    """Mean score of the oracle per equally wide bin of predicted score; empty bins are left out."""
    edges = np.linspace(np.min(predicted), np.max(predicted), num_bins + 1)
    # The highest prediction lies on the last edge, and belongs to the last bin.
    bins = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, num_bins - 1)
    table: list[CalibrationBin] = []
    for number in np.unique(bins):
        is_inside = bins == number
        table.append(
            CalibrationBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                num=int(is_inside.sum()),
                mean_predicted=float(np.mean(predicted[is_inside])),
                mean_oracle=float(np.mean(oracle[is_inside])),
            )
        )
    return table


def expected_calibration_error(
    confidences: Float[np.ndarray, " n"], correct: Shaped[np.ndarray, " n"], num_bins: int = 10
) -> float:
    """sum_b n_b / n |confidence_b - accuracy_b|, the gap of confidence and accuracy weighted by the bins' sizes.

    Bins of equal width over [0, 1], the left edge in the bin (arXiv 1706.04599, Eq. 3). `correct` may be fractional.
    Few answers in a bin are far from their confidence by chance: the value is biased upwards in small samples.

    Raises:
        ValueError: there is no answer.
    """
    if not len(confidences):
        raise ValueError("a calibration error needs at least one answer, got none")
    # A confidence of 1 belongs to the last bin.
    bins = np.clip((np.asarray(confidences, np.float64) * num_bins).astype(int), 0, num_bins - 1)
    # n_b (confidence_b - accuracy_b) is the sum of the differences within bin b.
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
    """exp(-sum log p / number of tokens) of sequences with these summed log-probabilities (nats).

    Infinite beyond float64.
    """
    exponent = -float(np.sum(logprobs)) / float(np.sum(num_tokens))
    return math.exp(exponent) if exponent < LARGEST_EXPONENT else math.inf


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all texts, words split at blanks (arXiv 1510.03055); 0 if there are none."""
    counts: Counter[Ngram] = Counter()
    for text in texts:
        counts.update(_ngrams(text.split(), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], *, max_n: int = 4, num_sampled: int = 200, seed: int = 0) -> float:
    """Mean BLEU of each text against all others (arXiv 1802.01886): 1 means all alike, near 0 all different.

    Words are split at blanks. More than `num_sampled` texts are sampled down first: the value depends on how many texts
    there are, so compare equal numbers. An n-gram order without a match counts as half a match, to keep short texts
    comparable. 0 for fewer than two texts.
    """
    words = [text.split() for text in texts]
    if len(words) > num_sampled:
        sampled = np.random.default_rng(seed).choice(len(words), num_sampled, replace=False)
        words = [words[i] for i in sampled]
    if len(words) < 2:
        return 0.0
    # BLEU is a geometric mean of the precisions of the n-grams of 1 to max_n words.
    log_precisions = np.zeros(len(words))
    for n in range(1, max_n + 1):
        for i, precision in enumerate(_precisions(words, n)):
            log_precisions[i] += math.log(precision) / max_n
    lengths = np.array([len(text) for text in words])
    scores: list[float] = []
    for i, log_precision in enumerate(log_precisions):
        scores.append(math.exp(log_precision) * _brevity(lengths, i))
    return float(np.mean(scores))


def _precisions(words: Sequence[Sequence[str]], n: int) -> list[float]:
    """Share of each text's n-grams that match another text, each at most as often as that one text has it."""
    counts = [_ngrams(text, n) for text in words]
    # The two largest counts of every n-gram in any one text. With them, the largest count in the *other* texts is found
    # without a comparison of every text with every other.
    largest: Counter[Ngram] = Counter()
    second: Counter[Ngram] = Counter()
    for text_counts in counts:
        for ngram, count in text_counts.items():
            second[ngram] = max(second[ngram], min(count, largest[ngram]))
            largest[ngram] = max(largest[ngram], count)
    precisions: list[float] = []
    for text_counts in counts:
        num_matches = 0
        for ngram, count in text_counts.items():
            # A text that holds the largest count has the others' largest in `second` (which is equal if one ties it).
            largest_in_others = second[ngram] if count == largest[ngram] else largest[ngram]
            num_matches += min(count, largest_in_others)
        precisions.append(max(num_matches, 0.5) / max(text_counts.total(), 1))
    return precisions


def _brevity(lengths: Shaped[np.ndarray, " n"], i: int) -> float:
    """BLEU's penalty for a text shorter than the other text nearest in length (the shorter of two as near)."""
    if not lengths[i]:
        return 0.0
    # Sorted, because argmin takes the first of equal distances.
    others = np.sort(np.delete(lengths, i))
    nearest = others[np.argmin(np.abs(others - lengths[i]))]
    return min(1.0, math.exp(1 - nearest / lengths[i]))


def _ngrams(words: Sequence[str], n: int) -> Counter[Ngram]:
    """Count the runs of n words."""
    shifted = [words[i:] for i in range(n)]
    # The shifted lists differ in length: zip ends with the last whole n-gram.
    return Counter(zip(*shifted, strict=False))


def _mean(values: Float64[np.ndarray, " n"]) -> Estimate:
    """Mean of independent values, with its standard error."""
    num = len(values)
    if not num:
        raise ValueError("an estimate needs at least one observation, got none")
    error = float(np.std(values, ddof=1)) / math.sqrt(num) if num > 1 else math.inf
    return Estimate(float(np.mean(values)), error, num)
