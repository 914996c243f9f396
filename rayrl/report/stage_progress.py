"""Progress of a stage under way: how far it is and how fast it goes, from the run directory alone.

A table's parts, a curve's steps and the ledger's queries all carry the time at which they came. Of the three kinds that
a stage leaves, the newest says where the stage is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rayrl.metrics.curves import read_times
from rayrl.report.ledger_counts import asked_at
from rayrl.report.recorded_run import RecordedRun
from rayrl.runs import storage
from rayrl.runs.stage_table import POOL, PSEUDO_LABEL, Purpose, Stage, num_refresh_blocks

WINDOW = 32
"""A rate is that of the last so many."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a stage. A number that is not known is None."""

    done: int
    total: int | None
    unit: str
    """Of `done` and `total`: blocks, steps or queries."""
    items: str
    """Of the rate: prompts, rows, pairs, responses or queries."""
    per_s: float | None
    eta_s: float | None
    at: float
    """Unix time of the last sign of life."""


def stage_progress(run: RecordedRun, stage: Stage, number: int) -> Progress | None:
    """Measure the progress of a stage that has begun and not finished; None for one that has left no sign yet."""
    signs = (_by_curve(run, stage, number), _by_table(run, stage, number), _by_ledger(run, stage))
    return max((sign for sign in signs if sign is not None), key=lambda sign: sign.at, default=None)


def measure(
    times: Sequence[float], *, done: int, total: int | None, unit: str, items: str, per_unit: float | None
) -> Progress | None:
    """Measure the progress of units that came at these times, one each, with `per_unit` items in each.

    Returns:
        None without a unit.
    """
    if not times:
        return None
    newest = sorted(times)[-WINDOW:]
    span = newest[-1] - newest[0]
    units_per_s = (len(newest) - 1) / span if span > 0 else None
    # A plan that is exceeded was wrong, and says nothing of the end.
    total = total if total is not None and total >= done else None
    return Progress(
        done=done,
        total=total,
        unit=unit,
        items=items,
        per_s=units_per_s * per_unit if units_per_s and per_unit else None,
        eta_s=(total - done) / units_per_s if units_per_s and total is not None else None,
        at=newest[-1],
    )


def _by_curve(run: RecordedRun, stage: Stage, number: int) -> Progress | None:
    training = stage.training(run.config)
    if training is None:
        return None
    members = [stage.member(member) for member in range(training.num_members)]
    # Members train one after another: the last that has begun is under way.
    for trained in [*reversed(members), stage]:
        times = read_times(run.curve(trained, number))
        if times:
            return measure(
                list(times.values()),
                done=max(times),
                total=_planned_steps(run.curve(trained, number)),
                unit="steps",
                items=training.items,
                per_unit=training.batch_size,
            )
    return None


def _planned_steps(curve: str) -> int | None:
    """Read the number of steps that a training announced beside its curve."""
    planned = curve.removesuffix("l")  # x.jsonl -> x.json
    return storage.read_json(planned)["num_steps"] if storage.exists(planned) else None


def _by_table(run: RecordedRun, stage: Stage, number: int) -> Progress | None:
    try:
        written = storage.times(run.stage_folder(stage, number))
    except FileNotFoundError:  # a temporary file that went while the folder was listed
        return None
    times_by_table: dict[str, list[float]] = {}
    for path, at in written.items():
        table, _, name = path.rpartition("/")
        if name.startswith("part-") and name.endswith(".parquet"):
            times_by_table.setdefault(table, []).append(at)
    if not times_by_table:
        return None
    table = max(times_by_table, key=lambda name: max(times_by_table[name]))
    total = _num_blocks(run, stage, table)
    return measure(
        times_by_table[table],
        done=len(times_by_table[table]),
        total=total,
        unit="blocks",
        items="prompts",
        per_unit=run.config.generate.block_size if total is not None else None,
    )


def _num_blocks(run: RecordedRun, stage: Stage, table: str) -> int | None:
    """Count the blocks that a table will have; None where the pool's blocks do not tell."""
    pool = run.metrics(POOL)
    if pool is None:
        return None
    match stage.prompts(run.config):
        case None:
            return None
        case "held_out":
            return pool.num_held_out_blocks
        case "refresh":
            wanted, size = run.config.refresh.num_prompts, run.config.generate.block_size
            return num_refresh_blocks(wanted, size, pool.num_train_blocks)
        case "pool":
            # Synthetic pairs follow the others in blocks of their own.
            is_doubled = stage is PSEUDO_LABEL and table == "table" and run.config.pseudo_label.synthetic
            return 2 * pool.num_train_blocks if is_doubled else pool.num_train_blocks


def _by_ledger(run: RecordedRun, stage: Stage) -> Progress | None:
    if stage.pays is None:
        return None
    # Stages of one purpose run one after another: those that have finished asked all that came before they ended.
    since = _last_finished(run, stage.pays)
    times = [at for at in asked_at(run.url, run.config, stage.pays) if at >= since]
    # Otherwise other stages or rounds share the budget, and how much is left for this one is not known. The control
    # "expert" asks about every response, whatever the budget.
    has_whole_budget = stage.pays == "label" and run.config.rounds == 1 and run.config.labels != "expert"
    total = run.config.select.budget if has_whole_budget else None
    return measure(times, done=len(times), total=total, unit="queries", items="queries", per_unit=1)


def _last_finished(run: RecordedRun, purpose: Purpose) -> float:
    """Find when the last of the finished stages that pay from a budget ended, in Unix time; 0 without one."""
    ended = [
        datetime.fromisoformat(manifest.finished_at).timestamp()
        for (stage, _), manifest in run.manifests.items()
        if manifest is not None and stage.pays == purpose
    ]
    return max(ended, default=0.0)
