"""Which figures a run has data for, by pipeline."""

from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from rayrl.metrics.curves import read_metrics
from rayrl.report import plots, plots_rlp
from rayrl.report.rlp_summary import REWARD_MODELS
from rayrl.report.rounds import round_folders, titled
from rayrl.report.tables import read_parquet
from rayrl.runs import storage


def draw_figures(run_dir: str, facts: dict[str, Any], evaluated: pa.Table | None) -> dict[str, Figure]:
    """Every figure the run has data for, by name. `evaluated` is the table of `evaluate`, if there is one."""
    is_rlp = facts["pipeline"] == "rlp"
    figures: dict[str, Figure] = {}
    if evaluated is not None:
        titles = facts["rlp"]["titles"] if is_rlp else {"m1": "M1", "m2": "M2"}
        columns = {title: evaluated[f"{name}_score"].drop_null().to_numpy() for name, title in titles.items()}
        if all(len(scores) for scores in columns.values()):
            figures["scores"] = plots.plot_scores(columns)
    folders = round_folders(run_dir, facts["config"])
    found = [read_parquet(storage.join(url, "stages", "select", "projection.parquet")) for url in folders.values()]
    projection = next((table for table in reversed(found) if table is not None and table.num_rows), None)
    if projection is not None:
        x, y, selected = (projection[name].to_numpy() for name in ("x", "y", "selected"))
        figures["coverage"] = plots.plot_coverage(x, y, selected)
    if len(facts["metrics"]["select"].get("radius") or []) > 1:
        figures["radius"] = plots.plot_radius(facts["metrics"]["select"]["radius"])
    return figures | (_of_rlp(folders, facts) if is_rlp else _of_proxy_dpo(folders, facts["metrics"]))


def _of_proxy_dpo(folders: dict[int, str], metrics: dict[str, Any]) -> dict[str, Figure]:
    return _curves(folders, ["sft", "fit_evaluator", "dpo"]) | _of_evaluator(metrics)


def _of_evaluator(metrics: dict[str, Any]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if any(metrics["query"].get("score_histogram", {}).values()):
        figures["paid_scores"] = plots.plot_paid_scores(metrics["query"]["score_histogram"])
    bins = metrics["fit_evaluator"].get("validation", {}).get("calibration", [])
    if any(b["num"] for b in bins):
        figures["calibration"] = plots.plot_calibration(bins)
    return figures


def _of_rlp(folders: dict[int, str], facts: dict[str, Any]) -> dict[str, Figure]:
    metrics, rlp = facts["metrics"], facts["rlp"]
    models, ppos = rlp["reward_models"], rlp["ppos"]
    members = [
        f"{stage}-{i}" for name, stage in REWARD_MODELS.items() for i in range(models[name].get("num_members", 1))
    ]
    figures = _curves(folders, ["sft", *(members if rlp["reward"] == "reward_model" else ["fit_evaluator"])])
    figures |= _of_evaluator(metrics)
    curves = {titled(title, n): _read_curve(url, stage) for n, url in folders.items() for stage, title in ppos.items()}
    curves = {title: curve for title, curve in curves.items() if curve or title in ppos.values()}
    if any(curves.values()):
        figures["ppo"] = plots_rlp.plot_ppo(curves)
    rounds = enumerate(facts["rounds"] or [metrics], start=1)
    trained = {titled(title, n): of[stage] for n, of in rounds for stage, title in ppos.items() if of[stage]}
    if trained:
        figures["times"] = plots_rlp.plot_times(trained)
    synthesized = metrics["synthesize"]
    if any(synthesized.get("confidences", {}).values()):
        figures["confidences"] = plots_rlp.plot_confidences(synthesized["confidences"], synthesized.get("gamma"))
    if synthesized.get("clustering") and any(synthesized.get("pairs_by_gamma", {}).values()):
        quality = metrics["audit_pairs"].get("accuracy_by_gamma", {})
        figures["gamma"] = plots_rlp.plot_gamma(synthesized["pairs_by_gamma"], synthesized.get("gamma"), quality)
    if points := metrics["track_rewards"].get("points"):
        figures["tracked"] = plots_rlp.plot_tracked(points, ppos, rlp["rewards"])
    return figures


def _curves(folders: dict[int, str], stages: list[str]) -> dict[str, Figure]:
    curves = {titled(stage, n): _read_curve(url, stage) for n, url in folders.items() for stage in stages}
    return {"curves": plots.plot_curves(curves)} if any(curves.values()) else {}


def _read_curve(run_dir: str, stage: str) -> list[dict[str, Any]]:
    return read_metrics(storage.join(run_dir, "metrics", f"{stage}.jsonl"))
