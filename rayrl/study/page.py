"""Page of a study: one HTML file that loads nothing, with a sentence, the curves, and the tables behind them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rayrl.algorithms.study_statistics import SeedsMean, mean_over_seeds
from rayrl.report.formats import printable
from rayrl.report.layout import FigureCard, Paragraph, Section, Table
from rayrl.report.page import environment, image_of
from rayrl.runs import storage
from rayrl.study.comparison import (
    EVERYTHING,
    LEVEL,
    LOSSES,
    NOTHING,
    SHARES,
    Comparison,
    Difference,
    Needed,
    settings_of,
    title_of,
)
from rayrl.study.config import Point
from rayrl.study.label_cells import LENGTH
from rayrl.study.overoptimisation import GoldRow, gold_rows, root_kl
from rayrl.study.plots import GoldLine, plot_efficiency, plot_gold, plot_means

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
        _gold(comparison),
        _labels_needed(comparison),
        _tests(comparison),
        _means(comparison),
        _failed(comparison),
    ]
    return [section for section in parts if section.parts]


def draw_figures(comparison: Comparison) -> dict[str, Figure]:
    """Draw the curves of every point of the grid, and the gold scores along PPO, by name."""
    figures = {f"curves{number}": _figure(comparison, point) for number, point in enumerate(comparison.points)}
    for number, rows in enumerate(_gold_groups(comparison)):
        study = comparison.study
        lines = {study.title(row.arm): _gold_line(row) for row in rows}
        figures[f"gold{number}"] = plot_gold(lines, baseline=study.title(study.baseline))
    return figures


def _figure(comparison: Comparison, point: Point) -> Figure:
    study, measure = comparison.study, comparison.measure
    curves: dict[str, dict[int, SeedsMean]] = {}
    for arm in study.arms:
        found = {b: comparison.mean_of(comparison.cells_of(arm, b, point), measure) for b in comparison.budgets}
        curves[study.title(arm)] = {budget: mean for budget, mean in found.items() if mean is not None}
    less = ", less is better" if comparison.is_loss else ""
    texts = {"measure": title_of(measure), "title": f"{title_of(measure).capitalize()}{less}{settings_of(point)}"}
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
        FigureCard(name=f"curves{number}", title=f"Label efficiency{settings_of(point)}", note=note)
        for number, point in enumerate(comparison.points)
    ]
    return Section(title="What labels buy", parts=cards)


def _gold_groups(comparison: Comparison) -> list[list[GoldRow]]:
    """Group the rows that have gold scores along PPO by budget and point of the grid: a figure each."""
    groups: dict[tuple[int, Point], list[GoldRow]] = {}
    for row in gold_rows(comparison.study, comparison.outcomes):
        groups.setdefault((row.budget, row.point), []).append(row)
    return list(groups.values())


def _gold_line(row: GoldRow) -> GoldLine:
    points = [[(root_kl(point), point.gain) for point in seed] for seed in row.seeds.values()]
    return GoldLine(seeds=points, curve=row.mean, turn=row.turn)


def _gold(comparison: Comparison) -> Section:
    """Arrange the gold scores along PPO: a figure and a table for each budget and point of the grid."""
    parts: list[Paragraph | Table | FigureCard] = []
    study = comparison.study
    for number, rows in enumerate(_gold_groups(comparison)):
        title = f"{rows[0].budget:,} labels{settings_of(rows[0].point)}"
        note = (
            "Dots are the measured policies of all seeds, the line is the fit; the dashed line is where it turns down, "
            "with its interval over seeds; in grey the baseline's fit."
        )
        parts.append(FigureCard(name=f"gold{number}", title=f"Gold score along PPO, {title}", note=note))
        head = ["row", "seeds", "reached", "turns down at", "gain there", "lost since"]
        head += ["best measured", "at", "gain at the end", "its reward"]
        best = {row.arm: row.best_measured() for row in rows}
        table = [
            [
                study.title(row.arm),
                str(len(row.seeds)),
                f"{row.reached:.2f}",
                bounded(row.turn.root_kl, row.turn.low, row.turn.high, ",.2f"),
                f"{row.mean.at(row.turn.root_kl):+.3f}" if row.lost is not None else "-",
                both_errors(row.lost, signed=True),
                both_errors(best[row.arm][0], signed=True),
                f"{best[row.arm][1]:.2f}",
                both_errors(row.at_the_end, signed=True),
                " \u2192 ".join(number_or_dash(reward, ".2f") for reward in row.rewards()),
            ]
            for row in rows
        ]
        parts.append(Table(head=head, rows=table, has_wide_names=True))
    if parts:
        explained = (
            "The oracle's score of the answers to held-out prompts, less M1's, against d, the root of the policy's KL "
            "to M1 in nats per response. Fitted is d (alpha - beta log d) (arXiv 2210.10760), which turns down at "
            "exp(alpha / beta - 1); in brackets the 95% interval over seeds (Fieller's). > is no turn, or an end that "
            "the seeds do not tell; beyond what was reached a turning point is extrapolated, and nothing was lost. "
            "Errors are over seeds, and of what was measured also over prompts. Best measured is the highest point of "
            "each seed, which needs no fit and is a little too high, as the highest of noisy scores is. Its reward is "
            "what the PPO followed, of M1 and of the last policies, in a unit of its own."
        )
        parts.insert(0, Paragraph(text=explained))
    return Section(title="Over-optimisation", parts=parts)


def _means(comparison: Comparison) -> Section:
    """Arrange the means: a table per measure with the budgets beside each other, or one table where there is one."""
    note = Paragraph(
        text="mean \u00b1 standard error over seeds, over prompts. The mean rank is over all seeds, budgets and "
        f"points, by {title_of(comparison.measure)}; 1 is best."
    )
    if len(comparison.budgets) == 1:
        return Section(title="Means", parts=[note, _means_at_one_budget(comparison)])
    tables: list[Paragraph | Table] = [note]
    for measure in _found_measures(comparison):
        less = " (less is better)" if measure in LOSSES else ""
        tables += [Paragraph(text=f"{title_of(measure).capitalize()}{less}", is_note=False)]
        tables += [_means_of(comparison, measure)]
    return Section(title="Means", parts=tables)


def _found_measures(comparison: Comparison) -> list[str]:
    """List the measures of the tables that some cell has: of comparisons without scores two alone."""
    return [name for name in comparison.study.measured if any(name in each for each in comparison.found.values())]


def _means_of(comparison: Comparison, measure: str) -> Table:
    """Make the table of one measure: a row per arm and point, a column per budget, and the controls below."""
    study = comparison.study
    ranked = measure == comparison.measure
    head = [
        "row",
        *study.factors,
        *(f"{budget:,}" for budget in comparison.budgets),
        *(["mean rank"] if ranked else []),
    ]
    rows: list[list[str]] = []
    for point in comparison.points:
        for arm in study.arms:
            cells = [comparison.cells_of(arm, budget, point) for budget in comparison.budgets]
            if not any(cells):
                continue
            means = [both_errors(comparison.mean_of(each, measure)) for each in cells]
            rank = [number_or_dash(comparison.ranks.get(arm, math.nan), ".2f")] if ranked else []
            rows.append([study.title(arm), *_values(point), *means, *rank])
        for control, title in _CONTROLS.items() if study.kind == "labels" else ():
            mean = comparison.mean_of(comparison.control_cells(control, point), measure)
            if mean is not None:
                others = [""] * (len(comparison.budgets) - 1 + ranked)
                rows.append([title, *_values(point), both_errors(mean), *others])
    return Table(head=head, rows=rows, num_text_columns=1 + len(study.factors), has_wide_names=True)


def _means_at_one_budget(comparison: Comparison) -> Table:
    """Make the table of all measures: a row per arm and point, a column per measure."""
    study = comparison.study
    (budget,) = comparison.budgets
    measures = _found_measures(comparison)
    head = ["row", *study.factors, *(title_of(measure) for measure in measures), "of ceiling", "mean rank"]
    rows: list[list[str]] = []
    for point in comparison.points:
        reachable = list(comparison.reachable(point).values())
        floor, ceiling = (
            mean_over_seeds([values[end] for values in reachable]).mean if reachable else math.nan for end in (0, 1)
        )
        rows_of = {study.title(arm): comparison.cells_of(arm, budget, point) for arm in study.arms}
        if study.kind == "labels":
            rows_of |= {title: comparison.control_cells(control, point) for control, title in _CONTROLS.items()}
        for title, cells in rows_of.items():
            if cells:
                means = [both_errors(comparison.mean_of(cells, measure)) for measure in measures]
                rank = {study.title(arm): value for arm, value in comparison.ranks.items()}.get(title, math.nan)
                share = share_of(comparison.mean_of(cells, comparison.measure), floor, ceiling)
                rows.append([title, *_values(point), *means, share, number_or_dash(rank, ".2f")])
    return Table(head=head, rows=rows, num_text_columns=1 + len(study.factors), has_wide_names=True)


def _tests(comparison: Comparison) -> Section:
    """Arrange the differences from the baseline and their p-values: a row per arm, a column per budget."""
    study = comparison.study
    if not comparison.differences:
        return Section(title="Tests", parts=[])
    found = {(each.arm, each.point, each.budget): each for each in comparison.differences}
    budgets: list[int | None] = [*([None] if len(comparison.budgets) > 1 else []), *comparison.budgets]
    head = ["row", *study.factors, *("all budgets" if budget is None else f"{budget:,}" for budget in budgets)]
    differences: list[list[str]] = []
    p_values: list[list[str]] = []
    for arm, point in dict.fromkeys((each.arm, each.point) for each in comparison.differences):
        row = [found.get((arm, point, budget)) for budget in budgets]
        names = [study.title(arm), *_values(point)]
        differences.append([*names, *(_difference(each) for each in row)])
        p_values.append(
            [*names, *("-" if each is None else f"{each.p_value:.2g}, {each.adjusted:.2g}" for each in row)]
        )
    note = (
        f"Each row less {study.title(study.baseline)} in {title_of(comparison.measure)}, paired by seed and prompt, "
        f"with the standard errors over seeds and over prompts; * marks those that are told apart (p below {LEVEL:g} "
        "after Holm's correction)."
    )
    tested = (
        "p-values, and after Holm's correction over all "
        f"{len(comparison.differences)} comparisons. p is the larger one of the t-tests over seeds and over prompts: a "
        "difference has to hold over both."
    )
    num_text_columns = 1 + len(study.factors)
    return Section(
        title="Differences from the baseline",
        parts=[
            Paragraph(text=note),
            Table(head=head, rows=differences, num_text_columns=num_text_columns, has_wide_names=True),
            Paragraph(text=tested),
            Table(head=head, rows=p_values, num_text_columns=num_text_columns, has_wide_names=True),
        ],
    )


def _difference(each: Difference | None) -> str:
    if each is None:
        return "-"
    return both_errors(each.difference, signed=True) + ("*" if each.is_told_apart else "")


def _labels_needed(comparison: Comparison) -> Section:
    unreachable = [
        Paragraph(text=f"{why}{settings_of(point)}.", is_note=False)
        for point in comparison.points
        if (why := comparison.why_nothing_is_reachable(point))
    ]
    if not comparison.needed:
        return Section(title="Labels needed", parts=unreachable)
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
        f"> is more than {comparison.budgets[-1]:,}, the largest budget, and of a ratio any number: too many resamples "
        "do not reach the share, which counts against both ends."
    )
    return Section(
        title="Labels needed",
        parts=[*unreachable, Paragraph(text=note), Table(head=head, rows=rows, num_text_columns=1 + len(factors))],
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
    """Write a number with its interval; infinite ones as ">", and one that may be any as from 0 to that."""
    if math.isnan(value):
        return "-"
    shown = [">" if each == math.inf else f"{max(each, 0.0):{pattern}}" for each in (value, low, high)]
    return shown[0] if math.isnan(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def share_of(mean: SeedsMean | None, floor: float, ceiling: float) -> str:
    """Write the gain over no labels as a share of what labelling everything gains; a dash where that is not known."""
    if mean is None or math.isnan(floor) or ceiling == floor:
        return "-"
    return f"{(mean.mean - floor) / (ceiling - floor):.0%}"


def number_or_dash(value: float, pattern: str) -> str:
    """Write a number; a dash where there is none."""
    return f"{value:{pattern}}" if math.isfinite(value) else "-"


def _values(point: Point) -> list[str]:
    return [str(value) for _, value in point]


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
