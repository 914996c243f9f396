"""How far a stage under way is and how fast it goes, from the run directory alone.

A table's parts, a curve's steps and the ledger's queries all carry the time at which they came; the newest of the three
kinds is what the stage is at.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rayrl.metrics.curves import read_times
from rayrl.report.spending import asked_at
from rayrl.runs import storage

WINDOW = 32
"""A rate is that of the last so many."""
TRAINED = {
    "sft": ("sft", "batch_size", "rows"),
    "fit_evaluator": ("evaluator", "batch_size", "rows"),
    "dpo": ("dpo", "batch_size", "pairs"),
    "fit_reward_model": ("reward_model", "batch_size", "pairs"),
    "refit_reward_model": ("reward_model", "batch_size", "pairs"),
    "ppo": ("ppo", "rollout_size", "responses"),
    "ppo_refreshed": ("ppo", "rollout_size", "responses"),
}
"""By stage: the setting that says how much a step of it takes, and of what."""
OF_POOL = ("generate", "select", "pseudo_label", "samples", "synthesize")
"""Stages whose tables have a block for each of the pool's, or of its first ones."""
PAID = {"query": "label", "preferences": "label", "evaluate": "evaluate"}


def pace(folder: str, stage: str, config: Mapping[str, Any], run_dir: str) -> dict[str, Any] | None:
    """How a stage goes: `done` of `total` `unit`, `per_s` of `items`, `eta_s`, and `at`, the time of its last sign.

    Args:
        folder: of the run, or of the round.
        stage: that has begun and not finished.
        config: the run's, as it was saved.
        run_dir: the run's folder.

    Returns:
        What is not known is None; None for a stage that has left no sign yet.
    """
    found = (
        _of_curve(folder, stage, config),
        _of_table(folder, stage, config, run_dir),
        _of_ledger(run_dir, stage, config),
    )
    return max((one for one in found if one is not None), key=lambda one: one["at"], default=None)


def paced(
    times: Sequence[float], done: int, total: int | None, unit: str, items: str, per_unit: float | None
) -> dict[str, Any] | None:
    """The pace of things that came at these times, one each, in which there are `per_unit` items; None of nothing."""
    if not times:
        return None
    newest = sorted(times)[-WINDOW:]
    span = newest[-1] - newest[0]
    speed = (len(newest) - 1) / span if span > 0 else None
    total = total if total is not None and total >= done else None
    return {
        "done": done,
        "total": total,
        "unit": unit,
        "items": items,
        "per_s": speed * per_unit if speed and per_unit else None,
        "eta_s": (total - done) / speed if speed and total is not None else None,
        "at": newest[-1],
    }


def _of_curve(folder: str, stage: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if stage not in TRAINED:
        return None
    section, name, items = TRAINED[stage]
    members = range(config.get("reward_model", {}).get("num_members", 1)) if section == "reward_model" else ()
    for curve in (*(f"{stage}-{member}" for member in reversed(members)), stage):  # the last that has begun
        times = read_times(storage.join(folder, "metrics", f"{curve}.jsonl"))
        if times:
            planned = storage.join(folder, "metrics", f"{curve}.json")
            total = storage.read_json(planned)["num_steps"] if storage.exists(planned) else None
            return paced(list(times.values()), max(times), total, "steps", items, config.get(section, {}).get(name))
    return None


def _of_table(folder: str, stage: str, config: Mapping[str, Any], run_dir: str) -> dict[str, Any] | None:
    tables: dict[str, list[float]] = {}
    try:
        written = storage.times(storage.join(folder, "stages", stage))
    except FileNotFoundError:  # one that went while the folder was read
        return None
    for path, at in written.items():
        table, _, name = path.rpartition("/")
        if name.startswith("part-") and name.endswith(".parquet"):
            tables.setdefault(table, []).append(at)
    if not tables:
        return None
    table = max(tables, key=lambda name: max(tables[name]))
    total = _num_blocks(stage, table, config, run_dir)
    size = config.get("generate", {}).get("block_size")
    return paced(tables[table], len(tables[table]), total, "blocks", "prompts", size if total is not None else None)


def _of_ledger(run_dir: str, stage: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if stage not in PAID:
        return None
    times = asked_at(run_dir, PAID[stage])
    whole = PAID[stage] == "label" and config.get("rounds", 1) == 1  # else others share the budget
    total = config.get("select", {}).get("budget") if whole else None
    return paced(times, len(times), total, "queries", "queries", 1)


def _num_blocks(stage: str, table: str, config: Mapping[str, Any], run_dir: str) -> int | None:
    """Blocks that a table will have, where the pool's say so."""
    manifest = storage.join(run_dir, "stages", "pool", "manifest.json")
    if not storage.exists(manifest):
        return None
    pool, size = storage.read_json(manifest)["metrics"], config.get("generate", {}).get("block_size", 1)
    if stage == "evaluate":
        return pool.get("held_out_blocks")
    num = pool.get("train_blocks")
    if stage not in OF_POOL or num is None:
        return None
    wanted = (config.get("refresh") or {}).get("num_prompts")
    if config.get("pipeline") == "rlp" and stage in ("samples", "synthesize") and wanted:
        num = min(num, -(-wanted // size))
    is_doubled = stage == "pseudo_label" and table == "table" and config.get("pseudo_label", {}).get("synthetic")
    return 2 * num if is_doubled else num
