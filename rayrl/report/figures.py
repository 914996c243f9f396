"""Figures that a run has data for, by name. How each is drawn is in `rayrl.report.plots`."""

from matplotlib.figure import Figure

from rayrl.metrics.curves import read_metrics
from rayrl.report import plots
from rayrl.report.facts import RunFacts
from rayrl.report.policies import ppo_titles, reward_titles
from rayrl.report.recorded_run import RecordedRun, title
from rayrl.report.tables import read_parquet
from rayrl.runs.stage_metrics import PpoMetrics
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    EVALUATE,
    FIT_EVALUATOR,
    PPO,
    PPO_REFRESHED,
    QUERY,
    SELECT,
    SYNTHESIZE,
    TRACK_REWARDS,
    Stage,
)

PPOS: tuple[Stage[PpoMetrics], ...] = (PPO, PPO_REFRESHED)


def draw_figures(facts: RunFacts) -> dict[str, Figure]:
    """Draw every figure the run has data for: scores, coverage, radius, paid_scores, calibration, curves, and so on."""
    run = facts.run
    return (
        _scores(facts)
        | _selection(run)
        | _evaluator(run)
        | _label_meter(facts)
        | _training_curves(run)
        | _ppo(run)
        | _synthetic_pairs(run)
        | _tracked(run)
    )


def training_stages(run: RecordedRun) -> list[Stage]:
    """List the stages with a training that are no PPO, whose curves have a figure of their own."""
    stages = dict.fromkeys(stage for stage, _ in run.manifests)
    return [stage for stage in stages if stage not in PPOS and stage.training(run.config) is not None]


def _scores(facts: RunFacts) -> dict[str, Figure]:
    table = read_parquet(facts.run.stage_folder(EVALUATE, 1, "table"))
    if table is None:
        return {}
    columns = {policy.title: f"{policy.name}_score" for policy in facts.policies}
    scores = {
        shown: table[column].drop_null().to_pylist()
        for shown, column in columns.items()
        if column in table.column_names
    }
    # Without a budget no answer is judged.
    return {"scores": plots.plot_scores(scores)} if scores and all(scores.values()) else {}


def _selection(run: RecordedRun) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    # The last round's picture: a later round selects from other responses.
    for number in reversed(run.rounds()):
        projection = read_parquet(run.stage_folder(SELECT, number, "projection.parquet"))
        if projection is not None and projection.num_rows:
            x, y, selected = (projection[name].to_pylist() for name in ("x", "y", "selected"))
            figures["coverage"] = plots.plot_coverage(x, y, selected)
            break
    selection = run.last(SELECT)
    if selection is not None and len(selection.radius) > 1:
        figures["radius"] = plots.plot_radius(selection.radius)
    return figures


def _evaluator(run: RecordedRun) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    asked, fitted = run.last(QUERY), run.last(FIT_EVALUATOR)
    if asked is not None and any(asked.score_histogram.values()):
        figures["paid_scores"] = plots.plot_paid_scores(asked.score_histogram)
    if fitted is not None and fitted.validation.calibration:
        figures["calibration"] = plots.plot_calibration(fitted.validation.calibration)
    return figures


def _label_meter(facts: RunFacts) -> dict[str, Figure]:
    if facts.meter is None or not facts.meter.measured:
        return {}
    return {"meter": plots.plot_learning_curve(facts.meter)}


def _training_curves(run: RecordedRun) -> dict[str, Figure]:
    curves: dict[str, plots.Curve] = {}
    for number in run.rounds():
        for stage in training_stages(run):
            training = stage.training(run.config)
            members = [] if training is None else [stage.member(member) for member in range(training.num_members)]
            # A reward model's curves are its members'; other trainings have one curve, their stage's.
            for trained in (stage, *members):
                curves[title(trained.name, number)] = read_metrics(run.curve(trained, number))
    return {"curves": plots.plot_curves(curves)} if any(curves.values()) else {}


def _ppo(run: RecordedRun) -> dict[str, Figure]:
    titles = ppo_titles(run.config)
    curves: dict[str, plots.Curve] = {}
    finished: dict[str, PpoMetrics] = {}
    for number in run.rounds():
        for stage in PPOS:
            if (stage, number) not in run.manifests:
                continue
            shown = title(titles[stage.name], number)
            curve = read_metrics(run.curve(stage, number))
            # Those of the first round have a place in the legend before they begin.
            if curve or number == 1:
                curves[shown] = curve
            metrics = run.metrics(stage, number)
            if metrics is not None:
                finished[shown] = metrics
    figures: dict[str, Figure] = {}
    if any(curves.values()):
        figures["ppo"] = plots.plot_ppo(curves)
    if finished:
        figures["times"] = plots.plot_times(finished)
    return figures


def _synthetic_pairs(run: RecordedRun) -> dict[str, Figure]:
    synthesized, audited = run.last(SYNTHESIZE), run.last(AUDIT_PAIRS)
    if synthesized is None or synthesized.clustering is None:
        return {}
    figures: dict[str, Figure] = {}
    if any(synthesized.confidences.values()):
        figures["confidences"] = plots.plot_confidences(synthesized.confidences, synthesized.gamma)
    if any(synthesized.pairs_by_gamma.values()):
        quality = {} if audited is None else audited.accuracy_by_gamma
        figures["gamma"] = plots.plot_gamma(synthesized.pairs_by_gamma, synthesized.gamma, quality)
    return figures


def _tracked(run: RecordedRun) -> dict[str, Figure]:
    tracked = run.last(TRACK_REWARDS)
    if tracked is None or not tracked.points:
        return {}
    return {"tracked": plots.plot_tracked(tracked.points, ppo_titles(run.config), reward_titles(run.config))}
