"""Comparison of a study's arms: means with errors, tests against the baseline, ranks, labels needed, one sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayrl.algorithms.agreement import COMPARISON_MEASURES, MEASURES
from rayrl.algorithms.study_statistics import (
    SeedsMean,
    bootstrap_means,
    holm,
    interval,
    labels_needed,
    mean_over_seeds,
    mean_ranks,
    paired_by_prompt,
    paired_test,
)
from rayrl.study.config import Point, StudyConfig
from rayrl.study.results import Cell, Measured, Outcome

NOTHING, EVERYTHING = "no labels", "everything"
"""Names of the controls between which gains are counted (`rayrl.study.label_cells`)."""
SHARES = (0.8, 0.9, 0.95)
"""Of the gain of labelling everything."""
LEVEL = 0.05
"""Of all tests together."""
FROM_M1 = {"gain": 0.0, "win_rate": 0.5}
"""Value of M1 itself, which has no labels, in each measure of runs that is counted from it."""
LOSSES = frozenset({"regret", "regret_without_length", "kl", "perplexity", "labels"})
"""Measures of which less is better."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm less the baseline, on the same seeds and prompts."""

    arm: str
    point: Point
    budget: int | None
    """None: the mean over all budgets."""
    difference: SeedsMean
    p_value: float
    adjusted: float
    """By Holm's method, over all comparisons of the study."""

    @property
    def is_told_apart(self) -> bool:
        """Return whether it counts at the level of all tests together."""
        return self.adjusted < LEVEL


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Labels with which an arm gains a share of what labelling everything does."""

    arm: str
    point: Point
    share: float
    labels: float
    """Infinite: more than the largest budget."""
    low: float
    high: float
    """Of a bootstrap interval of 95% over seeds and prompts; NaN where none is asked for. -inf and inf where too many
    resamples tell no number, so that it may be any."""
    ratio: float
    """The baseline's labels over these; NaN where neither reaches it."""
    ratio_low: float
    ratio_high: float


class Comparison:
    """All that a study's report shows.

    Args:
        study: the study.
        outcomes: of its cells, controls included.
    """

    def __init__(self, study: StudyConfig, outcomes: Sequence[Outcome]) -> None:
        self.study = study
        self.outcomes = list(outcomes)
        self.measure = study.measured[0]
        """The measure that is tested and drawn."""
        self.found: dict[Cell, dict[str, Measured]] = {
            outcome.cell: outcome.by_name() for outcome in outcomes if not outcome.failure
        }
        """Measures by name of every cell that has a result."""
        self.points = study.points()
        self.budgets = sorted({outcome.cell.budget for outcome in outcomes if outcome.cell.arm in study.arms})

    @property
    def failed(self) -> list[Outcome]:
        """Return the cells without a result."""
        return [outcome for outcome in self.outcomes if outcome.failure]

    @property
    def is_loss(self) -> bool:
        """Return whether less is better of the measure that is tested."""
        return self.measure in LOSSES

    def cells_of(self, arm: str, budget: int, point: Point) -> dict[int, dict[str, Measured]]:
        """Return the results of an arm at a budget, by seed; those that failed are left out."""
        found: dict[int, dict[str, Measured]] = {}
        for seed in self.study.seeds:
            measured = self.found.get(Cell(arm=arm, budget=budget, seed=seed, point=point))
            if measured is not None:
                found[seed] = measured
        return found

    def control_cells(self, name: str, point: Point) -> dict[int, dict[str, Measured]]:
        """Return the results of a control by seed: that of a study of labels, or the ceiling of a study of runs."""
        ceilings = [arm for arm, variant in self.study.variants.items() if variant.is_ceiling]
        if self.study.kind == "runs":
            of_ceiling = [self.cells_of(arm, budget, point) for arm in ceilings for budget in self.budgets[-1:]]
            return of_ceiling[0] if of_ceiling and name == EVERYTHING else {}
        controls = [cell for cell in self.found if cell.arm == name and cell.point == point]
        return {cell.seed: self.found[cell] for cell in controls}

    def mean_of(self, cells: Mapping[int, Mapping[str, Measured]], measure: str) -> SeedsMean | None:
        """Mean of a measure over seeds; None where no cell has it."""
        measured = [each[measure] for each in cells.values() if measure in each]
        return over_seeds(measured) if measured else None

    @cached_property
    def differences(self) -> list[Difference]:
        """Compare every arm with the baseline: at each budget, and over all budgets; empty without intervals."""
        if not self.study.intervals:
            return []
        found: list[tuple[str, Point, int | None, SeedsMean]] = []
        ceilings = {arm for arm, variant in self.study.variants.items() if variant.is_ceiling}
        for point in self.points:
            for arm in self.study.arms:
                if arm == self.study.baseline or arm in ceilings:
                    continue
                at_budgets = {budget: self._paired(arm, budget, point) for budget in self.budgets}
                for budget, paired in at_budgets.items():
                    if len(paired) > 1:
                        found.append((arm, point, budget, mean_over_seeds(list(paired.values()))))
                everywhere = _mean_over_budgets(list(at_budgets.values()))
                if len(self.budgets) > 1 and len(everywhere) > 1:
                    found.append((arm, point, None, mean_over_seeds(everywhere)))
        p_values = [paired_test(difference) for *_, difference in found]
        return [
            Difference(arm=arm, point=point, budget=budget, difference=difference, p_value=p, adjusted=adjusted)
            for (arm, point, budget, difference), p, adjusted in zip(found, p_values, holm(p_values), strict=True)
        ]

    def _paired(self, arm: str, budget: int, point: Point) -> dict[int, dict[str, float]]:
        """Differences from the baseline by prompt, of every seed that both have."""
        ours, theirs = self.cells_of(arm, budget, point), self.cells_of(self.study.baseline, budget, point)
        found: dict[int, dict[str, float]] = {}
        for seed in ours.keys() & theirs.keys():
            if self.measure in ours[seed] and self.measure in theirs[seed]:
                paired = paired_by_prompt(values_of(ours[seed][self.measure]), values_of(theirs[seed][self.measure]))
                if paired:
                    found[seed] = paired
        return found

    @cached_property
    def ranks(self) -> dict[str, float]:
        """Mean rank of every arm, over all seeds, budgets and points where all arms have a result."""
        blocks: list[list[float]] = []
        for point in self.points:
            for budget in self.budgets:
                cells = [self.cells_of(arm, budget, point) for arm in self.study.arms]
                for seed in self.study.seeds:
                    found = [
                        each[seed][self.measure].mean if _has(each, seed, self.measure) else math.nan for each in cells
                    ]
                    blocks.append(found)
        if not blocks:
            return {}
        ranks = mean_ranks(np.array(blocks), is_loss=self.is_loss)
        return {arm: float(rank) for arm, rank in zip(self.study.arms, ranks, strict=True)}

    def reachable(self, point: Point) -> dict[int, tuple[dict[str, float], dict[str, float]]]:
        """Return the values by prompt of no labels and of everything, for each seed that has both.

        Of a study of runs no labels are M1, from which some measures are counted; empty for others.
        """
        everything, nothing = self.control_cells(EVERYTHING, point), self.control_cells(NOTHING, point)
        found: dict[int, tuple[dict[str, float], dict[str, float]]] = {}
        for seed in everything:
            ceiling = values_of(everything[seed][self.measure]) if _has(everything, seed, self.measure) else {}
            floor: dict[str, float] = {}
            if self.study.kind == "runs" and self.measure in FROM_M1:
                floor = dict.fromkeys(ceiling, FROM_M1[self.measure])
            elif _has(nothing, seed, self.measure):
                floor = values_of(nothing[seed][self.measure])
            if ceiling.keys() & floor.keys():
                found[seed] = floor, ceiling
        return found

    def why_nothing_is_reachable(self, point: Point) -> str:
        """Say why labels needed mean nothing, where labelling everything gains nothing that counts; "" if it does."""
        reachable = self.reachable(point)
        if not reachable:
            return ""
        gain = mean_over_seeds([paired_by_prompt(everything, nothing) for nothing, everything in reachable.values()])
        p_value = paired_test(gain) if self.study.intervals else 0.0
        if (-gain.mean if self.is_loss else gain.mean) > 0 and p_value < LEVEL:
            return ""
        return (
            f"Labelling everything is not told apart from no labels in {title_of(self.measure)} ({gain.mean:+.3g}, "
            f"p = {p_value:.2g}): the evaluator learns nothing that it shows, and how many labels are needed cannot be "
            "told"
        )

    @cached_property
    def needed(self) -> list[Needed]:
        """Labels needed for shares of the gain of labelling everything; empty where that is not known, or nothing."""
        return [each for point in self.points for each in self._needed_at(point)] if len(self.budgets) > 1 else []

    def _needed_at(self, point: Point) -> list[Needed]:
        others = [arm for arm in self.study.arms if arm != self.study.baseline]
        # Variants are controls, but for one that all others are compared with, which is the first here.
        arms = [
            arm
            for arm in (self.study.baseline, *others)
            if arm not in self.study.variants or arm == self.study.baseline
        ]
        whole = self._whole_seeds(arms, point)
        if not whole or self.why_nothing_is_reachable(point):
            return []
        seeds = [values for _, values in whole]
        # Columns: no labels, everything, and then every arm at every budget.
        values = np.stack([seed.mean(0) for seed in seeds]).mean(0)[None]
        resampled = values[:0]
        if self.study.intervals:
            resampled = bootstrap_means(seeds, [prompts for prompts, _ in whole], self.study.num_resamples)
        found: list[Needed] = []
        for share in SHARES:
            estimates = self._labels(values, len(arms), share)[0]
            drawn = self._labels(resampled, len(arms), share)
            for number, arm in enumerate(arms):
                low, high = interval(drawn[:, number])
                ratios = _ratio(drawn[:, 0], drawn[:, number])
                ratio_low, ratio_high = interval(ratios)
                found.append(
                    Needed(
                        arm=arm,
                        point=point,
                        share=share,
                        labels=float(estimates[number]),
                        low=low,
                        high=high,
                        ratio=float(_ratio(estimates[:1], estimates[number : number + 1])[0]),
                        ratio_low=ratio_low,
                        ratio_high=ratio_high,
                    )
                )
        return found

    def _labels(self, means: np.ndarray, num_arms: int, share: float) -> np.ndarray:
        """Labels needed of every arm, for each row of means."""
        sign = -1.0 if self.is_loss else 1.0
        needed = np.full((len(means), num_arms), np.inf)
        for row, mean in enumerate(sign * means):
            reachable = mean[1] - mean[0]
            if reachable <= 0:  # nothing is gained by labelling everything: no number of labels is a share of it
                needed[row] = np.nan
                continue
            gains = (mean[2:].reshape(num_arms, -1) - mean[0]) / reachable
            needed[row] = [labels_needed(self.budgets, gain.tolist(), share) for gain in gains]
        return needed

    def _whole_seeds(self, arms: Sequence[str], point: Point) -> list[tuple[list[str], np.ndarray]]:
        """Prompts, and values (prompts, points), of the seeds of which every cell has a result."""
        seeds: list[tuple[list[str], np.ndarray]] = []
        for seed, (nothing, everything) in self.reachable(point).items():
            columns = [nothing, everything]
            for arm in arms:
                for budget in self.budgets:
                    cells = self.cells_of(arm, budget, point)
                    columns.append(values_of(cells[seed][self.measure]) if _has(cells, seed, self.measure) else {})
            if common := set.intersection(*map(set, columns)):
                prompts = sorted(common)
                seeds.append((prompts, np.array([[column[prompt] for column in columns] for prompt in prompts])))
        return seeds

    @property
    def conclusion(self) -> str:
        """Say which strategy, and how many labels; or that no strategy is told apart."""
        baseline = self.study.title(self.study.baseline)
        if not self.study.intervals:
            return f"Nothing is tested: intervals = false.{self._advice_at_points(self.study.baseline)}"
        tested = [each for each in self.differences if each.arm in self.study.arms]
        if not tested:
            return "Nothing is compared: no other strategy has results with the baseline's seeds and prompts."
        sign = -1.0 if self.is_loss else 1.0
        better = [each for each in tested if each.is_told_apart and sign * each.difference.mean > 0]
        num_worse = len({each.arm for each in tested if each.is_told_apart and sign * each.difference.mean < 0})
        worse = f" {num_worse} of them worse than it." if num_worse else ""
        if not better:
            smallest = min(each.adjusted for each in tested)
            return (
                f"No strategy is told apart from {baseline} for the better: the smallest p-value of {len(tested)} "
                f"comparisons is {smallest:.2g} after Holm's correction.{worse}"
                f"{self._advice_at_points(self.study.baseline)}"
            )
        overall = [each for each in better if each.budget is None] or better
        best = max(overall, key=lambda each: sign * each.difference.mean)
        at = "over all budgets" if best.budget is None else f"with {best.budget:,} labels"
        at += settings_of(best.point)
        return (
            f"Take {self.study.title(best.arm)}: {at} it is better than {baseline} by "
            f"{abs(best.difference.mean):.3g} in {title_of(self.measure)} (p = {best.adjusted:.2g} after Holm's "
            f"correction, {len(tested)} comparisons). {self._advice(best.arm, best.point)}"
        ).strip()

    def _advice_at_points(self, arm: str) -> str:
        """Say how many labels an arm needs, after another sentence: on a line for each point of the grid."""
        separator = "\n" if len(self.points) > 1 else " "
        sentences = [self._advice(arm, point) for point in self.points]
        return "".join(f"{separator}{sentence}" for sentence in sentences if sentence)

    def _advice(self, arm: str, point: Point) -> str:
        """Say how many labels an arm needs at a point of the grid for 90% of what is reachable there."""
        at = settings_of(point)
        found = [each for each in self.needed if (each.arm, each.point, each.share) == (arm, point, 0.9)]
        if not found:
            why_not = self.why_nothing_is_reachable(point)
            return f"{why_not}{at}." if why_not else ""
        (needed,) = found
        if math.isinf(needed.labels):
            return (
                f"{self.study.title(arm)}{at} does not reach 90% of what labelling everything gives with "
                f"{self.budgets[-1]:,} labels: buy more, or look for better vectors."
            )
        return (
            f"{self.study.title(arm)}{at} needs {needed.labels:,.0f} labels for 90% of what labelling everything gives"
            f"{_bounds(needed.low, needed.high)}{self._saving(needed)}."
        )

    def _saving(self, needed: Needed) -> str:
        if needed.arm == self.study.baseline or not math.isfinite(needed.ratio):
            return ""
        bounds = _bounds(needed.ratio_low, needed.ratio_high, ".2g")
        return f", {self.study.title(self.study.baseline)} {needed.ratio:.2g} times as many{bounds}"


def over_seeds(measured: Sequence[Measured]) -> SeedsMean:
    """Mean over seeds of one measure; by prompt where it has prompts, else from the errors of each seed.

    Which prompts seeds share is not known then: the error over prompts is that of the same prompts with every seed, the
    largest that it may be, and so many prompts are counted.
    """
    if all(each.values for each in measured):
        return mean_over_seeds([values_of(each) for each in measured])
    means = [each.mean for each in measured]
    return SeedsMean(
        mean=float(np.mean(means)),
        seed_error=float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.inf,
        prompt_error=math.fsum(each.standard_error for each in measured) / len(means),
        num_seeds=len(means),
        num_prompts=max(each.num for each in measured),
    )


def values_of(measured: Measured) -> dict[str, float]:
    """Return a measure's values by prompt."""
    return dict(zip(measured.prompt_ids, measured.values, strict=True))


def settings_of(point: Point) -> str:
    """Write the settings of a point of the grid, as they follow on what they are of; "" without a grid."""
    return "".join(f", {setting} = {value}" for setting, value in point)


def title_of(measure: str) -> str:
    """Return what a reader calls a measure."""
    of_labels = MEASURES | COMPARISON_MEASURES
    return of_labels[measure].title if measure in of_labels else measure.replace("_", " ")


def _has(cells: Mapping[int, Mapping[str, Measured]], seed: int, measure: str) -> bool:
    return seed in cells and measure in cells[seed]


def _mean_over_budgets(at_budgets: Sequence[Mapping[int, Mapping[str, float]]]) -> list[dict[str, float]]:
    """Mean over budgets of the differences by prompt, of each seed that has all budgets."""
    if not at_budgets:
        return []
    seeds = set.intersection(*(set(paired) for paired in at_budgets))
    found: list[dict[str, float]] = []
    for seed in sorted(seeds):
        prompts = set.intersection(*(set(paired[seed]) for paired in at_budgets))
        if prompts:
            found.append(
                {p: math.fsum(paired[seed][p] for paired in at_budgets) / len(at_budgets) for p in sorted(prompts)}
            )
    return found


def _ratio(baseline: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Labels of the baseline over an arm's; NaN where neither is finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isinf(baseline) & np.isinf(ours), np.nan, baseline / ours)


def _bounds(low: float, high: float, pattern: str = ",.0f") -> str:
    """Write an interval; nothing where there is none."""
    if math.isnan(low):
        return ""
    lower, upper = ("more than was tried" if end == math.inf else f"{max(end, 0.0):{pattern}}" for end in (low, high))
    return f" (95% interval {lower} to {upper})"
