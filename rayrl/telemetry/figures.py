"""Which figures a run has data for, by pipeline."""

from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from rayrl.runs import storage
from rayrl.telemetry import plots, plots_rlp
from rayrl.telemetry.metrics import read_metrics
from rayrl.telemetry.rlp_summary import PPOS, REWARD_MODELS
from rayrl.telemetry.tables import read_parquet


def draw_figures(run_dir: str, facts: dict[str, Any], evaluated: pa.Table | None) -> dict[str, Figure]:
    """Every figure the run has data for, by name. `evaluated` is the table of `evaluate`, if there is one."""
    is_rlp = facts["pipeline"] == "rlp"
    figures: dict[str, Figure] = {}
    if evaluated is not None:
        titles = facts["rlp"]["titles"] if is_rlp else {"m1": "M1", "m2": "M2"}
        columns = {title: evaluated[f"{name}_score"].drop_null().to_numpy() for name, title in titles.items()}
        if all(len(scores) for scores in columns.values()):
            figures["scores"] = plots.plot_scores(columns)
    projection = read_parquet(storage.join(run_dir, "stages", "select", "projection.parquet"))
    if projection is not None and projection.num_rows:
        x, y, selected = (projection[name].to_numpy() for name in ("x", "y", "selected"))
        figures["coverage"] = plots.plot_coverage(x, y, selected)
    if len(facts["metrics"]["select"].get("radius") or []) > 1:
        figures["radius"] = plots.plot_radius(facts["metrics"]["select"]["radius"])
    return figures | (_of_rlp(run_dir, facts) if is_rlp else _of_proxy_dpo(run_dir, facts["metrics"]))


def _of_proxy_dpo(run_dir: str, metrics: dict[str, Any]) -> dict[str, Figure]:
    figures = _curves(run_dir, ["sft", "fit_evaluator", "dpo"])
    if any(metrics["query"].get("score_histogram", {}).values()):
        figures["paid_scores"] = plots.plot_paid_scores(metrics["query"]["score_histogram"])
    bins = metrics["fit_evaluator"].get("validation", {}).get("calibration", [])
    if any(b["num"] for b in bins):
        figures["calibration"] = plots.plot_calibration(bins)
    return figures


def _of_rlp(run_dir: str, facts: dict[str, Any]) -> dict[str, Figure]:
    metrics, models = facts["metrics"], facts["rlp"]["reward_models"]
    members = [
        f"{stage}-{i}" for name, stage in REWARD_MODELS.items() for i in range(models[name].get("num_members", 1))
    ]
    figures = _curves(run_dir, ["sft", *members])
    curves = {title: _read_curve(run_dir, stage) for stage, title in PPOS.items()}
    if any(curves.values()):
        figures["ppo"] = plots_rlp.plot_ppo(curves)
    trained = {title: metrics[stage] for stage, title in PPOS.items() if metrics[stage]}
    if trained:
        figures["times"] = plots_rlp.plot_times(trained)
    synthesized = metrics["synthesize"]
    if any(synthesized.get("confidences", {}).values()):
        figures["confidences"] = plots_rlp.plot_confidences(synthesized["confidences"], synthesized.get("gamma"))
    if synthesized.get("clustering") and any(synthesized.get("pairs_by_gamma", {}).values()):
        quality = metrics["audit_pairs"].get("accuracy_by_gamma", {})
        figures["gamma"] = plots_rlp.plot_gamma(synthesized["pairs_by_gamma"], synthesized.get("gamma"), quality)
    if points := metrics["track_rewards"].get("points"):
        figures["tracked"] = plots_rlp.plot_tracked(points)
    return figures


def _curves(run_dir: str, stages: list[str]) -> dict[str, Figure]:
    curves = {stage: _read_curve(run_dir, stage) for stage in stages}
    return {"curves": plots.plot_curves(curves)} if any(curves.values()) else {}


def _read_curve(run_dir: str, stage: str) -> list[dict[str, Any]]:
    return read_metrics(storage.join(run_dir, "metrics", f"{stage}.jsonl"))
