"""Page of a study: one HTML file that loads nothing, with a sentence, the curves, and the tables behind them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rayrl.algorithms.study_statistics import SeedsMean
from rayrl.report.formats import printable
from rayrl.report.layout import FigureCard, Paragraph, Section, Table
from rayrl.report.page import environment, image_of
from rayrl.runs import storage
from rayrl.study.comparison import EVERYTHING, LEVEL, NOTHING, SHARES, Comparison, Needed, title_of
from rayrl.study.config import Point
from rayrl.study.label_cells import LENGTH
from rayrl.study.plots import plot_efficiency, plot_means

PAGE = "study.html"
TEMPLATES = Path(__file__).parent / "templates"
FEW_SEEDS = 5
"""Below so many seeds an interval over seeds is a rough one."""
MAX_REASONS = 5
"""Different reasons of failed cells that the page lists."""


def write_page(comparison: Comparison) -> str:
    """Write the page into the study's folder; return its place."""
    place = storage.join(storage.absolute(comparison.study.study_dir), PAGE)
    storage.write_bytes(place, render_page(comparison).encode())
    return place


def render_page(comparison: Comparison) -> str:
    """Write the page of a study."""
    study = comparison.study
    figures = draw_figures(comparison)
    about = (
        f"kind {study.kind}, {len(study.arms)} rows, {len(study.seeds)} seeds, budgets {_listed(comparison.budgets)}"
    )
    return (
        environment(TEMPLATES)
        .get_template("study.html.jinja")
        .render(
            name=study.name,
            about=f"{about}; {study.study_dir}",
            conclusion=comparison.conclusion,
            caveats=caveats(comparison),
            sections=sections(comparison),
            settings=settings(comparison),
            figures={name: image_of(figure) for name, figure in figures.items()},
        )
    )


def caveats(comparison: Comparison) -> list[str]:
    """List what a reader has to know before the numbers."""
    study, found = comparison.study, list[str]()
    if comparison.failed:
        reasons = Counter(outcome.failure for outcome in comparison.failed).most_common(MAX_REASONS)
        told = "; ".join(f"{num} times: {printable(reason)}" for reason, num in reasons)
        found.append(f"{len(comparison.failed)} of {len(comparison.outcomes)} cells failed and are left out. {told}.")
    if len(study.seeds) < FEW_SEEDS:
        found.append(f"{len(study.seeds)} seeds are few: the intervals are rough, and small differences cannot show.")
    if study.kind == "labels":
        found.append(
            "All seeds draw from one pool. The errors over prompts say what other prompts would change; what another "
            "pool, policy or oracle would change, no number here says."
        )
        if study.split == "study":
            found.append(
                "All seeds hold out the same prompts: the errors over seeds do not know what others would give."
            )
    return found


def sections(comparison: Comparison) -> list[Section]:
    """Arrange the tables and figures."""
    parts = [
        _curves(comparison),
        _means(comparison),
        _tests(comparison),
        _labels_needed(comparison),
        _failed(comparison),
    ]
    return [section for section in parts if section.parts]


def draw_figures(comparison: Comparison) -> dict[str, Figure]:
    """Draw the curves of every point of the grid, by name."""
    return {f"curves{number}": _figure(comparison, point) for number, point in enumerate(comparison.points)}


def _figure(comparison: Comparison, point: Point) -> Figure:
    study, measure = comparison.study, comparison.measure
    curves: dict[str, dict[int, SeedsMean]] = {}
    for arm in study.arms:
        found = {b: comparison.mean_of(comparison.cells_of(arm, b, point), measure) for b in comparison.budgets}
        curves[study.title(arm)] = {budget: mean for budget, mean in found.items() if mean is not None}
    less = ", less is better" if comparison.is_loss else ""
    texts = {"measure": title_of(measure), "title": f"{title_of(measure).capitalize()}{less}{_at(point)}"}
    baseline = study.title(study.baseline)
    if len(comparison.budgets) == 1:
        means = {arm: mean for arm, curve in curves.items() for mean in curve.values()}
        return plot_means(means, baseline=baseline, **texts)
    controls = {name: comparison.mean_of(comparison.control_cells(name, point), measure) for name in _CONTROLS}
    known = {_CONTROLS[name]: mean for name, mean in controls.items() if mean is not None}
    return plot_efficiency(curves, known, baseline=baseline, **texts)


_CONTROLS = {EVERYTHING: "labelling everything", LENGTH: LENGTH, NOTHING: NOTHING}


def _curves(comparison: Comparison) -> Section:
    note = "Bands are one standard error over seeds."
    cards = [
        FigureCard(name=f"curves{number}", title=f"Label efficiency{_at(point)}", note=note)
        for number, point in enumerate(comparison.points)
    ]
    return Section(title="What labels buy", parts=cards)


def _means(comparison: Comparison) -> Section:
    """Make the table of means: a row per arm, budget and point; the controls below."""
    study = comparison.study
    factors = list(study.factors)
    head = ["row", *factors, "labels", *(title_of(measure) for measure in study.measured), "mean rank", "seeds"]
    rows: list[list[str]] = []
    for point in comparison.points:
        for arm in study.arms:
            for budget in comparison.budgets:
                cells = comparison.cells_of(arm, budget, point)
                rank = number_or_dash(comparison.ranks.get(arm, math.nan), ".2f")
                labels = [study.title(arm), *_values(point), f"{budget:,}"]
                means = [both_errors(comparison.mean_of(cells, measure)) for measure in study.measured]
                rows.append([*labels, *means, rank, str(len(cells))])
        for control in (NOTHING, LENGTH, EVERYTHING) if study.kind == "labels" else ():
            cells = comparison.control_cells(control, point)
            if cells:
                num_labels = np_mean([each["labels"].mean for each in cells.values() if "labels" in each])
                means = [both_errors(comparison.mean_of(cells, measure)) for measure in study.measured]
                rows.append([control, *_values(point), f"{num_labels:,.0f}", *means, "-", str(len(cells))])
    note = (
        "mean \u00b1 standard error over seeds, over prompts. The mean rank is over all seeds, budgets and points, by "
        f"{title_of(comparison.measure)}; 1 is best."
    )
    return Section(
        title="Means",
        parts=[Paragraph(text=note), Table(head=head, rows=rows, num_text_columns=1 + len(factors))],
    )


def _tests(comparison: Comparison) -> Section:
    study = comparison.study
    if not comparison.differences:
        return Section(title="Tests", parts=[])
    factors = list(study.factors)
    head = [
        "row",
        *factors,
        "labels",
        f"difference in {title_of(comparison.measure)}",
        "p",
        "p after Holm",
        "told apart",
    ]
    rows = [
        [
            study.title(each.arm),
            *_values(each.point),
            "all budgets" if each.budget is None else f"{each.budget:,}",
            both_errors(each.difference, signed=True),
            f"{each.p_value:.2g}",
            f"{each.adjusted:.2g}",
            "yes" if each.is_told_apart else "no",
        ]
        for each in comparison.differences
    ]
    note = (
        f"Each row against {study.title(study.baseline)}, paired by seed and prompt. p is the larger one of the "
        "t-tests over seeds and over prompts: a difference has to hold over both. Holm's correction is over all "
        f"{len(rows)} comparisons; told apart is below {LEVEL:g} after it."
    )
    table = Table(head=head, rows=rows, num_text_columns=1 + len(factors))
    return Section(title="Differences from the baseline", parts=[Paragraph(text=note), table])


def _labels_needed(comparison: Comparison) -> Section:
    if not comparison.needed:
        return Section(title="Labels needed", parts=[])
    study = comparison.study
    factors = list(study.factors)
    percents = [f"{share:.0%}" for share in SHARES]
    head = [
        "row",
        *factors,
        *(f"labels for {each}" for each in percents),
        *(f"baseline's, times, {each}" for each in percents),
    ]
    rows: list[list[str]] = []
    by_arm: dict[tuple[str, Point], list[Needed]] = {}
    for each in comparison.needed:
        by_arm.setdefault((each.arm, each.point), []).append(each)
    for (arm, point), needed in by_arm.items():
        labels = [bounded(each.labels, each.low, each.high, ",.0f") for each in needed]
        ratios = [bounded(each.ratio, each.ratio_low, each.ratio_high, ".2f") for each in needed]
        is_baseline = arm == study.baseline
        rows.append([study.title(arm), *_values(point), *labels, *(["1"] * len(ratios) if is_baseline else ratios)])
    note = (
        "Labels with which the gain over no labels is this share of what labelling everything gains, by linear "
        "interpolation of the monotone curve; in brackets the 95% interval of a bootstrap over seeds and prompts. "
        "The last columns are the baseline's labels divided by the row's: above 1 the row needs fewer. "
        f"> is more than {comparison.budgets[-1]:,}, the largest budget."
    )
    return Section(
        title="Labels needed",
        parts=[Paragraph(text=note), Table(head=head, rows=rows, num_text_columns=1 + len(factors))],
    )


def _failed(comparison: Comparison) -> Section:
    rows = [[printable(outcome.cell.title), printable(outcome.failure)] for outcome in comparison.failed]
    if not rows:
        return Section(title="Failed cells", parts=[])
    return Section(title="Failed cells", parts=[Table(head=["cell", "reason"], rows=rows, num_text_columns=2)])


def settings(comparison: Comparison) -> dict[str, str]:
    """List the settings that the page shows."""
    study = comparison.study
    shown = {
        "base config": study.base,
        "baseline": study.title(study.baseline),
        "seeds": _listed(study.seeds),
        "tested measure": title_of(comparison.measure),
        "set": json.dumps(study.set) if study.set else "",
        "grid": json.dumps(study.factors) if study.factors else "",
    }
    if study.kind == "labels":
        shown |= {"held out": f"{study.held_out:.0%} of the prompts, by {study.split}", "evaluator": study.evaluator}
    return {title: value for title, value in shown.items() if value}


def both_errors(mean: SeedsMean | None, *, signed: bool = False) -> str:
    """Write a mean with its errors over seeds and over prompts; those that are not known are left out."""
    if mean is None:
        return "-"
    errors = [error for error in (mean.seed_error, mean.prompt_error) if math.isfinite(error)]
    sign = "+" if signed else ""
    written = f"{mean.mean:{sign}.3f}" if abs(mean.mean) < 100 else f"{mean.mean:{sign},.0f}"
    return f"{written} \u00b1 {', '.join(f'{error:.3f}' for error in errors)}" if errors else written


def bounded(value: float, low: float, high: float, pattern: str) -> str:
    """Write a number with its interval; infinite ones as ">"."""
    if math.isnan(value):
        return "-"
    shown = [">" if math.isinf(each) else f"{each:{pattern}}" for each in (value, low, high)]
    return shown[0] if math.isnan(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def number_or_dash(value: float, pattern: str) -> str:
    """Write a number; a dash where there is none."""
    return f"{value:{pattern}}" if math.isfinite(value) else "-"


def np_mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of none."""
    return math.fsum(values) / len(values) if values else 0.0


def _values(point: Point) -> list[str]:
    return [str(value) for _, value in point]


def _at(point: Point) -> str:
    return "".join(f", {setting} = {value}" for setting, value in point)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
