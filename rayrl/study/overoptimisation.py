"""Over-optimisation in a study of runs: the fitted curve of every row's gold scores, and where it turns down."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayrl.algorithms.overoptimisation import GoldCurve, Turn, fit_gold_curve, mean_curve, turning_point
from rayrl.algorithms.study_statistics import SeedsMean
from rayrl.study.comparison import over_seeds
from rayrl.study.config import Point, StudyConfig
from rayrl.study.results import GoldPoint, Measured, Outcome


@dataclass(frozen=True, kw_only=True)
class GoldRow:
    """One row of a study at one budget and one point of the grid."""

    arm: str
    budget: int
    point: Point
    seeds: Mapping[int, Sequence[GoldPoint]]
    """Measured points by seed, steps ascending; M1 is the first."""
    curves: Mapping[int, GoldCurve]
    """Fitted to them, by seed."""
    turn: Turn

    @property
    def mean(self) -> GoldCurve:
        """Return the mean curve of the seeds."""
        return mean_curve(list(self.curves.values()))

    @property
    def reached(self) -> float:
        """Return the largest distance from M1 that a seed has, root nats."""
        return max(root_kl(point) for points in self.seeds.values() for point in points)

    @property
    def at_the_end(self) -> SeedsMean:
        """Return the measured gold score less M1's of the last policies."""
        last = [points[-1] for points in self.seeds.values()]
        return over_seeds([_measured(point.gain, point.standard_error, point.num) for point in last])

    def best_measured(self) -> tuple[SeedsMean, float]:
        """Return the highest gold score less M1's of each seed's points, and how far from M1 they are in the mean.

        It needs no fit, but the highest of noisy scores is too high in the mean.
        """
        best = [max(points, key=lambda point: point.gain) for points in self.seeds.values()]
        gain = over_seeds([_measured(point.gain, point.standard_error, point.num) for point in best])
        return gain, math.fsum(map(root_kl, best)) / len(best)

    def rewards(self) -> tuple[float, float]:
        """Return the mean reward of M1 and of the last policies, in the reward's own unit."""
        first, last = ([points[end].reward for points in self.seeds.values()] for end in (0, -1))
        return math.fsum(first) / len(first), math.fsum(last) / len(last)

    @property
    def lost(self) -> SeedsMean | None:
        """Return what the fitted curves lose from the mean curve's turning point to each seed's last policy.

        None where that point lies beyond the last policies.
        """
        if not self.turn.root_kl < self.reached:
            return None
        lost = [
            curve.at(self.turn.root_kl) - curve.at(root_kl(self.seeds[seed][-1])) for seed, curve in self.curves.items()
        ]
        return over_seeds([_measured(each, math.nan, 0) for each in lost])


def gold_rows(study: StudyConfig, outcomes: Sequence[Outcome]) -> list[GoldRow]:
    """Fit every row that has gold scores, in the study's order; a seed without two distances from M1 is left out."""
    found: dict[tuple[str, int, Point], dict[int, Sequence[GoldPoint]]] = {}
    for outcome in outcomes:
        cell, points = outcome.cell, [point for point in outcome.gold if not math.isnan(point.gain)]
        if len({point.kl for point in points if point.kl > 0}) > 1:
            found.setdefault((cell.arm, cell.budget, cell.point), {})[cell.seed] = points
    rows: list[GoldRow] = []
    for (arm, budget, point), seeds in sorted(found.items(), key=lambda item: study.arms.index(item[0][0])):
        curves = {seed: fit(points) for seed, points in seeds.items()}
        turn = turning_point(list(curves.values()))
        rows.append(GoldRow(arm=arm, budget=budget, point=point, seeds=seeds, curves=curves, turn=turn))
    return rows


def fit(points: Sequence[GoldPoint]) -> GoldCurve:
    """Fit the curve of one seed."""
    return fit_gold_curve([root_kl(point) for point in points], [point.gain for point in points])


def root_kl(point: GoldPoint) -> float:
    """Return a point's distance from M1, root nats."""
    return math.sqrt(point.kl)


def _measured(mean: float, standard_error: float, num: int) -> Measured:
    return Measured(measure="gold", mean=mean, standard_error=standard_error, num=num)
