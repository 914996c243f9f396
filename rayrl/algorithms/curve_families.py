"""Families of learning curves, a - b g(n), and the curves of them that the measured agreement does not rule out.

    power law    g(n) = (n / n_1)^-c
    exponential  g(n) = exp(-(n / n_1 - 1) / c)

The asymptote a is what is reachable; b >= 0 is what is missing of it at the first size, n_1. `fit_curves` finds the
best curve by least squares, weighted by the covariance of the measurements. With it come all curves of both families
that a test at 10% does not reject: their misfit is larger by at most the 90% point of chi-square with one degree of
freedom. The interval of whatever follows from a curve, such as the labels that 95% of a take, is its range over these
curves: the profile likelihood's interval. Percentiles of fits to bootstrap samples, each of the family that predicts it
better, were tried first: where the labels leave the family open, they held the truth too seldom
(jobs/bench/RESULTS.md).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

CHI_SQUARE_90 = 2.7055
"""90% point of chi-square with one degree of freedom."""
NUM_RATES = 48
"""Values of c that are tried, first over all, then over those that are not ruled out."""
NUM_ASYMPTOTES, NUM_GAPS = 41, 9
"""Values of a, and of b for each, that stand for the curves of one c."""
NUM_PARAMETERS = 3
NUM_PREDICTED = 3
"""Largest sizes that cross-validation predicts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of curves, as functions of x = n / n_1."""

    decay: Callable[[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]], Float64[np.ndarray, "..."]]
    """g(x, c): 1 at x = 1, falling to 0."""
    labels: Callable[[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]], Float64[np.ndarray, "..."]]
    """x at which g has fallen to a value, given that and c."""
    rates: Callable[[float], tuple[float, float]]
    """Smallest and largest c, given the largest x. Beyond them curves are straight lines, or over at once."""


FAMILIES: dict[str, Family] = {
    "power law": Family(
        decay=lambda x, rate: x**-rate,
        labels=lambda value, rate: value ** (-1 / rate),
        rates=lambda longest: (0.1, 3.0),
    ),
    "exponential": Family(
        decay=lambda x, rate: np.exp((1 - x) / rate),
        labels=lambda value, rate: 1 - rate * np.log(value),
        rates=lambda longest: (0.3, 10 * longest),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Learning curves, one per row."""

    first_size: float
    family: Int64[np.ndarray, " curves"]
    """Place in `FAMILIES`."""
    rate: Float64[np.ndarray, " curves"]
    """c."""
    asymptote: Float64[np.ndarray, " curves"]
    """a."""
    gap: Float64[np.ndarray, " curves"]
    """b."""
    misfit: Float64[np.ndarray, " curves"]
    """Above that of the best curve, in units of chi-square."""

    def at(self, num_labels: float) -> Float64[np.ndarray, " curves"]:
        """Expected agreement of each curve."""
        x = np.full(len(self.rate), num_labels / self.first_size)
        return self.asymptote - self.gap * self._by_family(lambda family, of: family.decay(x[of], self.rate[of]))

    def labels_for(self, agreement: Float64[np.ndarray, " curves"]) -> Float64[np.ndarray, " curves"]:
        """Labels at which each curve reaches a value of its own below its asymptote; 0 where it starts above it."""
        missing = np.divide(
            self.asymptote - agreement, self.gap, out=np.full(len(self.gap), np.inf), where=self.gap > 0
        )
        missing = np.clip(missing, np.finfo(np.float64).tiny, None)
        with np.errstate(over="ignore"):  # a slow power law takes more labels than a float can count
            x = self._by_family(lambda family, of: family.labels(missing[of], self.rate[of]))
        return np.where(missing >= 1, 0.0, x * self.first_size)

    def _by_family(
        self, compute: Callable[[Family, np.ndarray], Float64[np.ndarray, " some"]]
    ) -> Float64[np.ndarray, " curves"]:
        values = np.empty(len(self.rate))
        for number, family in enumerate(FAMILIES.values()):
            of = self.family == number
            values[of] = compute(family, of)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveFit:
    """The best curve, and those that the measurements do not rule out."""

    family: str
    """The one that predicts the larger sizes better from the smaller ones, unless its fit is rejected."""
    best: Curves
    """One curve of that family."""
    possible: Curves
    """Of both families."""

    def band(self, num_labels: float) -> tuple[float, float]:
        """90% interval of the expected agreement."""
        values = self.possible.at(num_labels)
        return float(values.min()), float(values.max())

    def band_of_measurement(self, num_labels: float, variance: float) -> tuple[float, float]:
        """90% interval of a new measurement, which varies about the curve.

        A value is in it if some curve is possible given both the measurements so far and that value.
        """
        values = self.possible.at(num_labels)
        reach = np.sqrt(variance * np.clip(CHI_SQUARE_90 - self.possible.misfit, 0, None))
        return max(0.0, float((values - reach).min())), min(1.0, float((values + reach).max()))


def fit_curves(
    sizes: Int64[np.ndarray, " sizes"],
    mean: Float64[np.ndarray, " sizes"],
    covariance: Float64[np.ndarray, "sizes sizes"],
) -> CurveFit:
    """Fit both families.

    Args:
        sizes: numbers of labels, rising; at least four.
        mean: measured agreement.
        covariance: of its errors.
    """
    problems = {name: _Profile(name, _rates(name, sizes), sizes, mean, covariance) for name in FAMILIES}
    bests = {name: problem.best() for name, problem in problems.items()}
    least = min(float(best.misfit[0]) for best in bests.values())
    # Where no curve fits, the errors are larger than they were taken to be (Birge's ratio).
    scale = max(1.0, least / max(1, len(sizes) - NUM_PARAMETERS))
    limit = least + CHI_SQUARE_90 * scale
    not_rejected = [name for name, best in bests.items() if best.misfit[0] <= limit]
    errors = {name: _prediction_error(name, sizes, mean, covariance) for name in not_rejected}
    family = min(not_rejected, key=lambda name: errors[name])
    best = bests[family]
    found: list[Curves] = [best]
    for name, problem in problems.items():
        near = problem.rates_near(limit)
        found.append(_Profile(name, near, sizes, mean, covariance).possible(limit))
    possible = Curves(
        first_size=best.first_size,
        **{
            field: np.concatenate([getattr(curves, field) for curves in found])
            for field in ("family", "rate", "asymptote", "gap")
        },
        misfit=np.concatenate([np.clip(curves.misfit - least, 0, None) / scale for curves in found]),
    )
    return CurveFit(family=family, best=best, possible=possible)


def _prediction_error(
    name: str,
    sizes: Int64[np.ndarray, " sizes"],
    mean: Float64[np.ndarray, " sizes"],
    covariance: Float64[np.ndarray, "sizes sizes"],
) -> float:
    """Cross-validation over the sizes: squared errors of the larger ones, predicted from the smaller ones."""
    error = 0.0
    for cut in range(max(NUM_PARAMETERS, len(sizes) - NUM_PREDICTED), len(sizes)):
        rates = _rates(name, sizes[:cut])
        curve = _Profile(name, rates, sizes[:cut], mean[:cut], covariance[:cut, :cut]).best()
        predicted = np.array([curve.at(float(size))[0] for size in sizes[cut:]])
        error += float(((predicted - mean[cut:]) ** 2 / np.diag(covariance)[cut:]).sum())
    return error


def _rates(name: str, sizes: Int64[np.ndarray, " sizes"]) -> Float64[np.ndarray, " rates"]:
    return _geometric(*FAMILIES[name].rates(float(sizes[-1] / sizes[0])), NUM_RATES)


def _geometric(low: float, high: float, num: int) -> Float64[np.ndarray, " rates"]:
    return np.geomspace(low, high, num)


def _steps(low: np.ndarray | float, high: np.ndarray | float, num: int) -> Float64[np.ndarray, "..."]:
    """Even steps between ends, along a new first axis."""
    return np.linspace(low, high, num)


class _Profile:
    """Weighted least squares in a and b, for each of some rates, under 0 <= a <= 1 and b >= 0.

    With the measurements y, ones o and the decay d, all whitened, the misfit is |y - a o + b d|^2.
    """

    def __init__(
        self,
        name: str,
        rates: Float64[np.ndarray, " rates"],
        sizes: Int64[np.ndarray, " sizes"],
        mean: Float64[np.ndarray, " sizes"],
        covariance: Float64[np.ndarray, "sizes sizes"],
    ):
        self.number, self.rates, self.first_size = list(FAMILIES).index(name), rates, float(sizes[0])
        root = np.linalg.cholesky(covariance)
        decay = FAMILIES[name].decay(sizes / sizes[0], rates[:, None])  # (rates, sizes)
        d = np.linalg.solve(root, decay.T).T
        o, y = np.linalg.solve(root, np.ones(len(sizes))), np.linalg.solve(root, mean)
        self.yy, self.oo, self.oy = float(y @ y), float(o @ o), float(o @ y)
        self.od, self.dd, self.dy = d @ o, (d * d).sum(1), d @ y
        self.all = np.arange(len(rates))
        self.asymptote, self.gap = self._least()
        self.misfit = self._misfit(self.asymptote, self.gap, self.all)

    def _misfit(self, a: np.ndarray, b: np.ndarray, rates: np.ndarray) -> Float64[np.ndarray, "..."]:
        of_a = self.yy - 2 * a * self.oy + a * a * self.oo
        return of_a + b * (2 * self.dy[rates] - 2 * a * self.od[rates] + b * self.dd[rates])

    def _least(self) -> tuple[Float64[np.ndarray, " rates"], Float64[np.ndarray, " rates"]]:
        """A and b of the least misfit: inside the bounds, or else on one of their edges."""
        determinant = self.oo * self.dd - self.od**2
        inside_a = (self.oy * self.dd - self.od * self.dy) / determinant
        inside_b = (self.oy * self.od - self.oo * self.dy) / determinant
        is_inside = (inside_a >= 0) & (inside_a <= 1) & (inside_b >= 0)
        flat = np.full(len(self.rates), np.clip(self.oy / self.oo, 0.0, 1.0))
        a, b = flat, np.zeros(len(self.rates))
        for edge in (0.0, 1.0):
            gap = np.clip((edge * self.od - self.dy) / self.dd, 0.0, None)
            is_better = self._misfit(np.full(len(gap), edge), gap, self.all) < self._misfit(a, b, self.all)
            a, b = np.where(is_better, edge, a), np.where(is_better, gap, b)
        return np.where(is_inside, inside_a, a), np.where(is_inside, inside_b, b)

    def best(self) -> Curves:
        """The curve of the least misfit."""
        least = np.array([int(self.misfit.argmin())])
        return self._curves(least, self.asymptote[least], self.gap[least])

    def rates_near(self, limit: float) -> Float64[np.ndarray, " rates"]:
        """Finer rates: about the best one, and over all that have curves of a misfit up to a limit."""
        near = [*np.flatnonzero(self.misfit <= limit).tolist(), int(self.misfit.argmin())]
        # One more on either side: the misfit may pass the limit between two.
        low, high = max(0, min(near) - 1), min(len(self.rates) - 1, max(near) + 1)
        return _geometric(float(self.rates[low]), float(self.rates[high]), NUM_RATES)

    def possible(self, limit: float) -> Curves:
        """Curves of a misfit up to a limit: for each rate values of a, and for each of these values of b."""
        rates = np.flatnonzero(self.misfit <= limit)
        if not len(rates):
            return self._curves(rates, np.empty(0), np.empty(0))
        oo, od, dd, dy = self.oo, self.od[rates], self.dd[rates], self.dy[rates]
        determinant = oo * dd - od**2
        center = (self.oy * dd - od * dy) / determinant
        lowest = self._misfit(center, (self.oy * od - oo * dy) / determinant, rates)
        half = np.sqrt(np.clip(limit - lowest, 0, None) * dd / determinant)
        a = np.clip(_steps(center - half, center + half, NUM_ASYMPTOTES), 0, 1)  # (asymptotes, rates)
        middle = (a * od - dy) / dd
        half = np.sqrt(np.clip(limit - self._misfit(a, middle, rates), 0, None) / dd)
        b = _steps(np.clip(middle - half, 0, None), middle + half, NUM_GAPS)  # (gaps, asymptotes, rates)
        a, at = np.broadcast_to(a, b.shape), np.broadcast_to(rates, b.shape)
        is_possible = (b >= 0) & (self._misfit(a, b, at) <= limit * (1 + 1e-9))
        # A flat curve is the same for every rate, and may be narrower than the steps in a.
        level, half = self.oy / oo, math.sqrt(max(0.0, limit - self.yy + self.oy**2 / oo) / oo)
        flat = np.clip(_steps(level - half, level + half, NUM_ASYMPTOTES), 0, 1)
        flat = flat[self.yy - 2 * flat * self.oy + flat**2 * oo <= limit * (1 + 1e-9)]
        return self._curves(
            np.append(at[is_possible], np.full(len(flat), rates[0])),
            np.append(a[is_possible], flat),
            np.append(b[is_possible], np.zeros(len(flat))),
        )

    def _curves(
        self,
        rates: Int64[np.ndarray, " curves"],
        asymptote: Float64[np.ndarray, " curves"],
        gap: Float64[np.ndarray, " curves"],
    ) -> Curves:
        return Curves(
            first_size=self.first_size,
            family=np.full(len(rates), self.number),
            rate=self.rates[rates],
            asymptote=asymptote,
            gap=gap,
            misfit=self._misfit(asymptote, gap, rates),
        )
