"""Epistemic heads: an ensemble of linear heads on frozen vectors, whose spread says what the labels leave open.

Head m is the ridge regression that stays near a prior of its own, on a bootstrap sample of the prompts:

    w_m = argmin_w  sum_i c_mi (y_i - w.x_i)^2 + ridge |w - p_m|^2,    p_m ~ N(0, noise^2 / ridge I),

with c_mi how often the prompt of label i was drawn. Random priors (Osband et al., arXiv 1806.03335) keep the heads
apart where no label says anything; for a linear model with independent noise they are samples of the posterior. Whole
prompts are drawn, since the responses to one prompt resemble each other. `ridge` and `noise` maximise the evidence of
the labels (MacKay, 1992), so nothing has to be set, and few labels leave the heads far apart. Comparisons have the same
heads with Bradley-Terry's loss on differences of vectors, and Laplace's approximation of the evidence.

A fit takes seconds, because the language model stays as it is; `Heads.scores` is one matrix product, so that the spread
of a whole pool is read on its shards.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

NUM_HEADS = 20
"""As the epistemic networks of ActiveUltraFeedback (arXiv 2603.09692) have."""
RIDGES = tuple(2.0**power for power in range(-5, 6))
"""Candidates for the ridge, as multiples of the mean squared length of the centred vectors: the scores' variance is
taken to be between 32 times and a 32nd of the noise's."""
NUM_NEWTON_STEPS = 30
CONVERGED = 1e-8
"""Newton's method has converged where no weight moves by more than this share of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Linear heads on the vectors that they were fitted on."""

    weights: Float32[np.ndarray, "d m"]
    bias: Float64[np.ndarray, " m"]
    noise: float
    """Standard deviation of a label about the score of its response; 1 for comparisons, whose noise is
    Bradley-Terry's."""
    ridge: float
    """The chosen ridge, absolute."""

    def scores(self, vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n m"]:
        """Every head's score of every vector."""
        return np.asarray(vectors, np.float32) @ self.weights + self.bias.astype(np.float32)


def mean_and_spread(scores: Float[np.ndarray, "n m"]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """The heads' mean score of each vector, and their standard deviation about it."""
    return scores.mean(1, dtype=np.float64), scores.std(1, dtype=np.float64, ddof=1)


def fit_heads(
    vectors: Float[np.ndarray, "n d"],
    scores: Float[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> Heads:
    """Fit heads on scores of single responses.

    Args:
        vectors: of the judged responses.
        scores: the oracle's.
        groups: each response's prompt, as a number.
        num_heads: of the ensemble.
        seed: draws the priors and the bootstrap samples.
    """
    center, mean_score = vectors.mean(0, dtype=np.float64), float(np.mean(scores))
    x = vectors.astype(np.float64) - center
    y = np.asarray(scores, np.float64) - mean_score
    ridge, noise = _most_evident_ridge(x, y)
    rng = np.random.default_rng(seed)
    counts = _bootstrap(groups, num_heads, rng)  # (n, m)
    priors = rng.standard_normal((x.shape[1], num_heads)) * noise / np.sqrt(ridge)
    weights = np.stack([_ridge(x, y, ridge, counts[:, m], priors[:, m]) for m in range(num_heads)], axis=1)
    bias = mean_score - center @ weights
    return Heads(weights=weights.astype(np.float32), bias=bias, noise=noise, ridge=ridge)


def fit_pair_heads(
    differences: Float[np.ndarray, "n d"],
    first_wins: Bool[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> Heads:
    """Fit heads on comparisons: `differences` are the first response's vector less the second's.

    The score of a response is known up to a constant, so the heads have no bias.
    """
    # Turned so that the first always wins: Bradley-Terry's loss is then log(1 + exp(-w.x)).
    x = np.where(first_wins[:, None], differences, -differences).astype(np.float64)
    ridge = _most_evident_pair_ridge(x)
    rng = np.random.default_rng(seed)
    counts = _bootstrap(groups, num_heads, rng)
    priors = rng.standard_normal((x.shape[1], num_heads)) / np.sqrt(ridge)
    weights = np.stack([_bradley_terry(x, ridge, counts[:, m], priors[:, m]) for m in range(num_heads)], axis=1)
    return Heads(weights=weights.astype(np.float32), bias=np.zeros(num_heads), noise=1.0, ridge=ridge)


def _ridge(
    x: Float64[np.ndarray, "n d"],
    y: Float64[np.ndarray, " n"],
    ridge: float,
    counts: Float64[np.ndarray, " n"],
    prior: Float64[np.ndarray, " d"],
) -> Float64[np.ndarray, " d"]:
    """The weights of one head, in closed form."""
    rows = np.flatnonzero(counts)
    root = np.sqrt(counts[rows])
    a, residual = x[rows] * root[:, None], (y[rows] - x[rows] @ prior) * root
    if len(rows) < a.shape[1]:  # the smaller of the two equal systems
        return prior + a.T @ np.linalg.solve(a @ a.T + ridge * np.eye(len(rows)), residual)
    return prior + np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ residual)


def _bradley_terry(
    x: Float64[np.ndarray, "n d"],
    ridge: float,
    counts: Float64[np.ndarray, " n"],
    prior: Float64[np.ndarray, " d"],
) -> Float64[np.ndarray, " d"]:
    """The weights of one head on comparisons that the first response won, by Newton's method.

    Each step is a ridge regression with the weights p (1 - p). The loss is convex, so that a step that does not lower
    it, halved often enough, does.
    """

    def objective(w: np.ndarray) -> float:
        return float(counts @ np.logaddexp(0, -(x @ w)) + ridge / 2 * np.sum((w - prior) ** 2))

    w, value = prior, objective(prior)
    for _ in range(NUM_NEWTON_STEPS):
        win = _win(x @ w)
        target = x @ w + 1 / win  # w.x + (1 - p) / (p (1 - p))
        step = _ridge(x, target, ridge, counts * win * (1 - win), prior) - w
        size = 1.0
        while objective(w + size * step) > value and size > CONVERGED:
            size /= 2
        w = w + size * step
        value = objective(w)
        if np.abs(step).max() <= CONVERGED * np.abs(w).max():
            break
    return w


def _win(margin: np.ndarray) -> np.ndarray:
    """Bradley-Terry's probability, away from 0 and 1 so that their logarithms and the curvature stay finite."""
    return 1 / (1 + np.exp(-np.clip(margin, -30, 30)))


def _most_evident_ridge(x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """The ridge, and the noise, under which the labels are likeliest: y ~ N(0, noise^2 (I + x x' / ridge)).

    From the smaller eigenproblem, whose remaining eigenvalues are 0.
    """
    num, scale = len(y), _mean_square(x)
    directions, singular, _ = np.linalg.svd(x, full_matrices=False)
    along = (directions.T @ y) ** 2
    across = max(0.0, float(y @ y - along.sum()))

    def noise_and_evidence(ridge: float) -> tuple[float, float]:
        variances = 1 + singular**2 / ridge
        noise = max((float((along / variances).sum()) + across) / num, float(np.finfo(np.float32).tiny))
        return noise, -(num * np.log(noise) + float(np.log(variances).sum())) / 2

    # Equal evidence is no evidence for a signal: the larger ridge.
    best = max(RIDGES, key=lambda ridge: (noise_and_evidence(ridge * scale)[1], ridge))
    return best * scale, float(np.sqrt(noise_and_evidence(best * scale)[0]))


def _most_evident_pair_ridge(x: Float64[np.ndarray, "n d"]) -> float:
    """The ridge under which the comparisons are likeliest, by Laplace's approximation about the likeliest weights."""
    scale, counts, prior = _mean_square(x), np.ones(len(x)), np.zeros(x.shape[1])

    def evidence(ridge: float) -> float:
        w = _bradley_terry(x, ridge, counts, prior)
        win = _win(x @ w)
        a = x * np.sqrt(win * (1 - win))[:, None]
        gram = a @ a.T if len(a) < a.shape[1] else a.T @ a
        log_determinant = np.linalg.slogdet(np.eye(len(gram)) + gram / ridge)[1]
        return float(np.log(win).sum() - ridge / 2 * w @ w - log_determinant / 2)

    return scale * max(RIDGES, key=lambda ridge: (evidence(ridge * scale), ridge))


def _mean_square(x: np.ndarray) -> float:
    """The mean squared length of the rows, above 0: the ridge's unit."""
    return max(float((x * x).sum()) / len(x), float(np.finfo(np.float32).tiny))


def _bootstrap(groups: np.ndarray, num_heads: int, rng: np.random.Generator) -> Float64[np.ndarray, "n m"]:
    """Draw prompts for each head, with replacement; the count of each row's prompt."""
    distinct, numbers = np.unique(groups, return_inverse=True)
    drawn = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=num_heads)  # (m, prompts)
    return drawn.T[numbers].astype(np.float64)
