"""Over-optimisation of a reward model: a gold expert's score as a policy moves away from M1, and where it turns down.

Against the root of the divergence, d = sqrt(KL(pi || M1)), the gold score less M1's follows (Sec. 3.1 of arXiv
2210.10760)

    R(d) = d (alpha - beta log d)   of reinforcement learning, and
    R(d) = d (alpha - beta d)       of best of n, which is not fitted here.

R is linear in alpha and beta, so that a curve of noisy scores is smoothed by least squares. Where beta > 0 it turns
down at d* = exp(alpha / beta - 1).
"""
# scipy has no types: its results are unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldCurve:
    """R(d) = d (alpha - beta log d), in the gold score's unit."""

    alpha: float
    beta: float

    def at(self, root_kl: float) -> float:
        """Gold score less M1's at a distance from M1, root nats; 0 at M1 itself."""
        return root_kl * (self.alpha - self.beta * math.log(root_kl)) if root_kl > 0 else 0.0

    @property
    def turn(self) -> float:
        """Return the distance at which the score is highest, root nats; infinite where it does not turn down."""
        return _distance(self.alpha / self.beta) if self.beta > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Distance from M1 at which the gold score turns down, root nats."""

    root_kl: float
    """Infinite: it does not turn down."""
    low: float
    high: float
    """Of an interval over seeds; NaN with one seed. An infinite end: that it turns down at all is not told."""


def fit_gold_curve(root_kls: Sequence[float], gains: Sequence[float]) -> GoldCurve:
    """Fit alpha and beta by least squares.

    Args:
        root_kls: distances from M1, root nats; points at 0 say nothing.
        gains: gold scores less M1's at them.

    Raises:
        ValueError: fewer than two different distances above 0.
    """
    d, y = np.asarray(root_kls, float), np.asarray(gains, float)
    y, d = y[d > 0], d[d > 0]
    if len(np.unique(d)) < 2:
        raise ValueError(f"a curve of gold scores needs two different distances from M1, got {sorted({*d.tolist()})}")
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], axis=1), y)
    return GoldCurve(alpha=float(alpha), beta=float(beta))


def mean_curve(seeds: Sequence[GoldCurve]) -> GoldCurve:
    """Average the curves of several seeds; at each distance it is the mean of their scores."""
    return GoldCurve(
        alpha=math.fsum(seed.alpha for seed in seeds) / len(seeds),
        beta=math.fsum(seed.beta for seed in seeds) / len(seeds),
    )


def turning_point(seeds: Sequence[GoldCurve], level: float = 0.95) -> Turn:
    """Locate the turning point of the mean curve, with its interval over seeds.

    log d* + 1 = alpha / beta is a ratio of two means over seeds, whose interval is Fieller's: all ratios rho for which
    alpha - rho beta is not told apart from 0 by a t-test. It has no upper end where beta is not told apart from 0.

    Raises:
        ValueError: no seed.
    """
    if not seeds:
        raise ValueError("a turning point needs the curve of a seed, got none")
    mean = mean_curve(seeds)
    if len(seeds) < 2:
        return Turn(root_kl=mean.turn, low=math.nan, high=math.nan)
    covariance = np.cov([[seed.alpha for seed in seeds], [seed.beta for seed in seeds]]) / len(seeds)
    squared = float(t.ppf((1 + level) / 2, len(seeds) - 1)) ** 2
    # a rho^2 + b rho + c <= 0
    a = mean.beta**2 - squared * covariance[1, 1]
    b = -2 * (mean.alpha * mean.beta - squared * covariance[0, 1])
    c = mean.alpha**2 - squared * covariance[0, 0]
    if a > 0 and mean.beta < 0:  # every seed's curve rises on, as far as can be told
        return Turn(root_kl=math.inf, low=math.inf, high=math.inf)
    if a <= 0 and (c <= 0 or mean.alpha <= 0):  # neither parameter is told apart from 0
        return Turn(root_kl=mean.turn, low=0.0, high=math.inf)
    spread = math.sqrt(max(0.0, b * b - 4 * a * c))
    if a <= 0:  # ratios above the larger root, and those of curves that do not turn
        larger = (-b - spread) / (2 * a) if a < 0 else -c / b
        return Turn(root_kl=mean.turn, low=_distance(larger), high=math.inf)
    return Turn(root_kl=mean.turn, low=_distance((-b - spread) / (2 * a)), high=_distance((-b + spread) / (2 * a)))


def _distance(ratio: float) -> float:
    """Return exp(alpha / beta - 1); infinite beyond what a float can hold."""
    return math.exp(ratio - 1) if ratio < 700 else math.inf
