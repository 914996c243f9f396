"""What a run directory says about its run: the facts behind the report, `rayrl runs` and `rayrl status`.

Reads the config, the manifests, the timings and the ledger's counts, and changes nothing. What a run has not
reached yet is None: a report can be made at any time, while the run goes on too.
"""

import math
from collections.abc import Iterable
from typing import Any

from rayrl.errors import DataError, RunDirectoryError
from rayrl.report.caveats import caveats
from rayrl.report.pace import pace
from rayrl.report.rlp_caveats import rlp_caveats
from rayrl.report.rlp_summary import rlp_controls, rlp_facts
from rayrl.report.rounds import num_rounds, round_folders, stages_by_round, titled
from rayrl.report.spending import spending
from rayrl.report.stages import STAGES, has_ready_pairs, left_out, nested, pipeline_of, reward_of
from rayrl.report.tables import read_parquet
from rayrl.runs import storage


def summarize_run(run_dir: str) -> dict[str, Any]:
    """The facts of one run as plain JSON values.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: one of its files is damaged.
    """
    run_dir = storage.absolute(run_dir)
    if not any(storage.exists(storage.join(run_dir, name)) for name in ("config.json", "stages")):
        raise RunDirectoryError(
            f"run_dir must be the folder of a run (with config.json in it), got {run_dir}; "
            "`rayrl runs FOLDER` lists the runs in a folder"
        )
    config = _read(run_dir, "config.json") or {}
    config = config or _recalled(run_dir)
    pipeline = pipeline_of(config)
    folders = round_folders(run_dir, config)
    manifests = {at: _read(folders[at[1]], "stages", at[0], "manifest.json") for at in stages_by_round(config)}
    rounds = [_metrics(manifests, pipeline, [number]) for number in folders]
    metrics = _metrics(manifests, pipeline, folders)
    absent = left_out(config)
    shown = {at: manifest for at, manifest in manifests.items() if manifest is not None or at[0] not in absent}
    stages = [
        _stage(folders[n], stage, m, config, run_dir) | {"stage": titled(stage, n)} for (stage, n), m in shown.items()
    ]
    inner = nested(config)
    outermost = [(m or {}).get("seconds", 0.0) for (stage, _), m in shown.items() if stage not in inner]
    facts = {
        "name": config.get("name", run_dir.rpartition("/")[2]),
        "run_dir": run_dir,
        "pipeline": pipeline,
        "seed": config.get("seed"),
        "control": [*(rlp_controls(config) if pipeline == "rlp" else []), *_controls(config)],
        "config": config,
        "seconds": sum(outermost),
        "stages": stages,
        "startup": _add_up(_read(run_dir, "timings.json") or []),
        "metrics": metrics,
        "rounds": rounds if num_rounds(config) > 1 else [],
        "paid": _paid(config, rounds, spending(run_dir)),
    }
    if pipeline == "rlp":
        evaluated = read_parquet(storage.join(run_dir, "stages", "evaluate", "table"))
        facts["rlp"] = rlp_facts(config, metrics, stages, evaluated)
    facts = _valid_json(facts)
    return facts | {"caveats": rlp_caveats(facts) if pipeline == "rlp" else caveats(facts)}


def gain(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The aligned policy minus M1 in mean expert score; None unless it was measured with its standard error."""
    return facts["rlp"]["gain"] if facts["pipeline"] == "rlp" else facts["metrics"]["evaluate"].get("difference")


def plus_minus(estimate: dict[str, Any] | None, *, signed: bool = False, percent: bool = False) -> str:
    """An estimate with its standard error, `+0.42 ± 0.05`. A mean without a standard error is not shown."""
    if estimate is None or estimate.get("mean") is None:
        return "not measured"
    mean, error = estimate["mean"], estimate.get("standard_error")
    if error is None:
        return "no standard error"
    if percent:
        return f"{100 * mean:{'+' if signed else ''}.1f}% \u00b1 {100 * error:.1f}"
    digits = 3 if error < 0.05 else 2
    return f"{mean:{'+' if signed else ''}.{digits}f} \u00b1 {error:.{digits}f}"


def _read(run_dir: str, *parts: str) -> Any:
    url = storage.join(run_dir, *parts)
    if not storage.exists(url):
        return None
    try:
        return storage.read_json(url)
    except ValueError as error:
        raise DataError(f"{url} must be JSON, but is damaged ({error}): delete it and run again") from None


def _metrics(manifests: dict[tuple[str, int], Any], pipeline: str, numbers: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Metrics of every stage, of the last of these rounds that has finished it."""
    found: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES[pipeline]}
    for (stage, number), manifest in manifests.items():
        if manifest is not None and number in numbers:
            found[stage] = manifest.get("metrics", {})
    return found


def _recalled(run_dir: str) -> dict[str, Any]:
    """What the stages still tell of a config that is gone."""

    def has(stage: str) -> bool:
        return storage.exists(storage.join(run_dir, "stages", stage))

    if has("preferences"):
        return {"pipeline": "rlp"}
    return {"pipeline": "rlp", "ppo": {"reward": "evaluator" if has("query") else "function"}} if has("ppo") else {}


def _controls(config: dict[str, Any]) -> list[str]:
    """Which controls of labelling the config turns on; empty is the method itself."""
    if pipeline_of(config) == "rlp" and reward_of(config) != "evaluator":
        return []
    labels = {
        "direct": "direct expert labels: DPO on the paid judgements alone",
        "expert": "all labels by the expert: the ceiling",
        "shuffled": "shuffled labels: the floor",
    }
    found = [labels[config["labels"]]] if config.get("labels") in labels else []
    if config.get("select", {}).get("strategy") == "random":
        found.append("random selection")
    if config.get("generate", {}).get("source") == "seed":
        found.append("off-policy queries: responses of the seed data")
    return found


def _stage(
    folder: str, stage: str, manifest: dict[str, Any] | None, config: dict[str, Any], run_dir: str
) -> dict[str, Any]:
    """A stage of the round in `folder`: what its manifest says; or whether it has begun, and how it goes."""
    if manifest is not None:
        kept = {name: manifest.get(name) for name in ("seconds", "num_rows", "summary", "finished_at")}
        return {"stage": stage, "state": "done"} | kept
    begun = (stage, f"{stage}-0")  # the second is the first member of an ensemble
    state = "started" if any(storage.exists(storage.join(folder, "stages", name)) for name in begun) else "not run"
    going = pace(folder, stage, config, run_dir) if state == "started" else None
    summary = f"{going['done']} {going['unit']} done" if going else None
    return {"stage": stage, "state": state, "seconds": None, "num_rows": None, "summary": summary, "pace": going}


def _add_up(timings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start-up times by what started: a resumed run starts things several times."""
    totals: dict[str, dict[str, Any]] = {}
    for timing in timings:
        total = totals.setdefault(timing["what"], {"what": timing["what"], "num": 0, "seconds": 0.0})
        total["num"] += 1
        total["seconds"] += timing["seconds"]
    return list(totals.values())


def _paid(config: dict[str, Any], rounds: list[dict[str, Any]], ledger: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The query budgets, what all rounds spent of them and what that bought; the latest count wins."""
    compares = pipeline_of(config) == "rlp" and reward_of(config) == "reward_model"
    stage = "preferences" if compares else "query"
    asked: dict[str, Any] = next((of[stage] for of in reversed(rounds) if of[stage]), {})
    counts = (asked, rounds[0]["evaluate"].get("ledger", {}), ledger)
    paid: dict[str, Any] = {}
    for purpose, section in (("label", "select"), ("evaluate", "evaluate")):
        table = config.get(section, {})
        paid[purpose] = {"budget": table["budget"] + table.get("diagnosis_budget", 0) if "budget" in table else None}
        for count in counts:
            paid[purpose] |= count.get(purpose, {})
    if pipeline_of(config) == "rlp":
        if reward_of(config) == "function" or has_ready_pairs(config):
            paid["label"] |= {"budget": 0, "spent": 0}
        return paid | {"num_pairs": asked.get("num_pairs")}
    spent = paid["label"].get("spent")
    num_scored, num_pairs, num_synthetic = (
        _total(rounds, name) for name in ("num_scored", "num_pairs", "num_synthetic")
    )
    ratio = num_pairs / spent if num_pairs is not None and spent else None
    paid |= {"num_scored": num_scored, "num_pairs": num_pairs, "pairs_per_query": ratio}
    return paid if num_synthetic is None else paid | {"num_synthetic": num_synthetic}


def _total(rounds: list[dict[str, Any]], name: str) -> int | None:
    """A count of `pseudo_label` over the rounds that have it; None if none has."""
    counts = [of["pseudo_label"][name] for of in rounds if of["pseudo_label"].get(name) is not None]
    return sum(counts) if counts else None


def _valid_json(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _valid_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_valid_json(item) for item in value]
    return value
