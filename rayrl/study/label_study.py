"""Study of labels, from its config to the outcomes of its cells: plan, pool, oracle, and the cells as Ray work."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import logging
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.metrics.progress import track
from rayrl.models.judge_prompt import load_rubric
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.preflight.oracle_tables import inspect_oracle_tables
from rayrl.preflight.workload import TEST_BUDGET
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.content import contents_of
from rayrl.runs.run import CONFIG, IDENTITY, LEDGER, identity, ledger_url
from rayrl.study.config import Point, StudyConfig, run_config
from rayrl.study.label_cells import CONTROLS, EVERYTHING, Job
from rayrl.study.pool import (
    StudyPool,
    held_out_prompts,
    pool_key,
    read_pool_table,
    read_vectors,
    refuse_small_pool,
    study_pool,
    write_pool_table,
)
from rayrl.study.results import Cell, Outcome, read_result

logger = logging.getLogger(__name__)

SPARE_LABELS = 0.1
"""Queries beyond those planned, as a share, for calls that are lost when a study is killed; none with `max_queries`."""


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """Work of a study of labels."""

    study: StudyConfig
    configs: dict[Point, RunConfig]
    """Of the run that makes the pool, by point of the grid."""
    tables: dict[str, pa.Table | None]
    """Pools by key; None for one that has to be made."""
    num_responses: int
    """Of the pool, at most."""
    num_choosable: int
    """Responses that labels are chosen from, with each seed."""
    num_queries: int
    """Labels that the oracle may be asked for, by all cells together."""
    jobs: list[Job]
    """All cells, controls included."""
    oracle: str
    """The oracle, for humans."""

    def missing(self) -> list[Job]:
        """Return the cells that have no result yet."""
        return [job for job in self.jobs if read_result(self.study.study_dir, job.key) is None]


def plan_labels(study: StudyConfig, *, contact_oracle: bool = False) -> LabelPlan:
    """Refuse a study that cannot end well, or plan it. Starts nothing.

    Raises:
        ConfigError, DataError, ResourceError, RunDirectoryError: one message: field, rule, value, remedy.
    """
    configs = {point: _pool_config(study, point) for point in study.points()}
    for point in study.points():
        for strategy in study.arms:
            _check_cell(study, point, strategy)
    keys = {point: pool_key(study, config) for point, config in configs.items()}
    tables = {key: _known_table(study, key) for key in keys.values()}
    first = configs[study.points()[0]]
    known = next((table for table in tables.values() if table is not None), None)
    if known is not None:
        inspect_oracle_tables(first, [])
        num_responses, num_choosable = known.num_rows, _num_choosable(study, study_pool("", known))
    else:
        num_responses, num_choosable = _most_responses(study, first, contact_oracle)
    refuse_small_pool(study, num_choosable, is_exact=known is not None or first.generate.source == "seed")
    num_queries = _num_queries(study, num_responses, num_choosable)
    if study.max_queries is not None and num_queries > study.max_queries:
        raise ConfigError(
            f"max_queries must cover the study, which may ask for {num_queries:,} labels"
            f"{' (ceiling = true labels everything)' if study.ceiling else ''}, got {study.max_queries:,}; raise it, "
            'lower budgets or held_out, use split = "study", or set ceiling = false'
        )
    jobs = [_job(study, configs[cell.point], keys[cell.point], cell) for cell in _cells(study)]
    return LabelPlan(
        study=study,
        configs=configs,
        tables=tables,
        num_responses=num_responses,
        num_choosable=num_choosable,
        num_queries=num_queries,
        jobs=jobs,
        oracle=first.oracle.label(),
    )


def run_labels(plan: LabelPlan, stopping: Stopping | None) -> list[Outcome]:
    """Make what is missing of the pool, the labels and the cells; return the outcomes of all cells."""
    study = plan.study
    missing = plan.missing()
    done = [job for job in plan.jobs if job not in missing]
    if done:
        logger.info("%d of %d cells are known already", len(done), len(plan.jobs))
    outcomes = [
        Outcome(cell=job.cell, key=job.key, measured=read_result(study.study_dir, job.key) or ()) for job in done
    ]
    if missing:
        outcomes += _run_missing(plan, missing, stopping)
    order = {job.key: place for place, job in enumerate(plan.jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.key])


def _run_missing(plan: LabelPlan, missing: Sequence[Job], stopping: Stopping | None) -> list[Outcome]:
    # Only here: Ray takes seconds to import, and a study whose cells are known needs none of it.
    import ray

    from rayrl.oracles.pool import end_oracle_pool, start_oracle_pool, stop_asking
    from rayrl.study.labels import label_all, start_labels
    from rayrl.study.scheduling import run_jobs

    study = plan.study
    tables = {
        key: table if table is not None else _made_table(plan, key, stopping) for key, table in plan.tables.items()
    }
    pools = {key: study_pool(key, table) for key, table in tables.items()}
    questions = next(iter(tables.values()))
    for table in tables.values():
        assert table["response_id"].equals(questions["response_id"]), "pools of one study have the same responses"
    refuse_small_pool(study, _num_choosable(study, next(iter(pools.values()))), is_exact=True)
    config = next(iter(plan.configs.values()))
    num_labels = study.max_queries or round(plan.num_queries * (1 + SPARE_LABELS)) + 1
    with ExitStack() as ends:
        oracle = start_oracle_pool(
            study.name,
            config.oracle,
            rubric=load_rubric(config.rubric),
            ledger=ledger_url(storage.absolute(study.study_dir), config),
            budgets={"label": num_labels, "evaluate": 0, "test": TEST_BUDGET},
            run=_identity(study),
        )
        ends.callback(end_oracle_pool, oracle)
        if stopping is not None:
            ends.enter_context(stopping.first(partial(stop_asking, oracle)))
        labels = start_labels(oracle, questions)
        label_all(labels, _asked_first(study, next(iter(pools.values()))))
        shared: dict[str, Any] = {key: ray.put(pool) for key, pool in pools.items()}
        running = run_jobs(missing, shared, labels, study.study_dir, study.resources)
        return list(track(running, "cells", total=len(missing)))


def _made_table(plan: LabelPlan, key: str, stopping: Stopping | None) -> pa.Table:
    from rayrl.study.pool_stages import make_pool

    point = next(point for point, config in plan.configs.items() if pool_key(plan.study, config) == key)
    # Loaded again: a pool that was made meanwhile gives what it has in common with this one.
    table = make_pool(_pool_config(plan.study, point), stopping)
    write_pool_table(plan.study, key, table)
    return table


def _known_table(study: StudyConfig, key: str) -> pa.Table | None:
    """Read a pool that is kept, or comes with the study."""
    return read_pool_table(study, key) if study.vectors is None else read_vectors(study.vectors)


def _pool_config(study: StudyConfig, point: Point) -> RunConfig:
    """Load the config of the run that samples and embeds the pool of a point."""
    folder = storage.absolute(study.study_dir)
    config = run_config(study, *point)
    if config.select.unit != "response" or config.asks_for_comparisons or not config.learns_from_judgements:
        raise ConfigError(
            'base must be a config whose oracle judges single responses (pipeline = "proxy_dpo", select.unit = '
            f'"response") where kind is "labels", got {study.base}; choose another, or kind = "runs"'
        )
    for name, unset in (("seed_centers", False), ("stop_at", None)):
        if getattr(config.select, name) != unset:
            raise ConfigError(
                f'select.{name} must be left out where kind is "labels", got {getattr(config.select, name)!r}: no '
                'cell reads it; leave it out of base and [set], or set kind = "runs"'
            )
    # By its key: another grid, or an edited prompt file, is another pool beside this one.
    name = f"pool-{pool_key(study, config)}"
    settings: list[tuple[str, object]] = [("run_dir", storage.join(folder, name)), ("name", f"{study.name}-{name}")]
    first = f"pool-{pool_key(study, run_config(study, *study.points()[0]))}"
    if first != name and storage.exists(storage.join(folder, first, CONFIG)):
        settings.append(("reuse", storage.join(folder, first)))
    if config.oracle.ledger is None and storage.is_local(folder):
        settings.append(("oracle.ledger", storage.join(folder, LEDGER)))
    return run_config(study, *point, *settings)


def _check_cell(study: StudyConfig, point: Point, strategy: str) -> None:
    """Refuse a strategy that the base config cannot have, such as one that reads labels and has none to begin with.

    Raises:
        ConfigError: the run's own refusal, and how a study sets what it asks for.
    """
    try:
        run_config(study, *point, ("select.strategy", strategy), ("select.budget", study.budgets[-1]))
    except ConfigError as error:
        raise ConfigError(f'strategies: "{strategy}" is refused; [set] holds settings of all cells. {error}') from None


def _cells(study: StudyConfig) -> list[Cell]:
    """List the cells: seeds outermost, so that an interrupted study has whole seeds."""
    cells: list[Cell] = []
    for seed in study.seeds:
        for point in study.points():
            for control in CONTROLS:
                if control != EVERYTHING or study.ceiling:
                    cells.append(Cell(arm=control, budget=0, seed=seed, point=point))
            for budget in study.budgets:
                cells += [Cell(arm=arm, budget=budget, seed=seed, point=point) for arm in study.arms]
    return cells


def _job(study: StudyConfig, config: RunConfig, pool: str, cell: Cell) -> Job:
    chooses = cell.arm not in CONTROLS
    reads_heads = chooses and STRATEGIES[cell.arm].reads_heads
    return Job(
        cell=cell,
        held_out=study.held_out,
        split_seed=cell.seed if study.split == "seed" else 0,
        num_batches=config.select.batches if chooses else 1,
        # A run's first batch is chosen by `first_batch` whatever its strategy is. Settings of a study are of all cells:
        # strategies that read no heads go without it, and are compared by what they choose themselves.
        first=config.select.first_batch if reads_heads else None,
        num_heads=config.select.num_heads,
        evaluator=study.evaluator,
        oracle=oracle_key(config),
        pool=pool,
    )


def oracle_key(config: RunConfig) -> str:
    """Name an oracle, what it answers from, and the rubric by which it judges."""
    contents = contents_of(config, {})
    read = [f"{setting} {contents[setting]}" for setting in sorted(contents) if setting.startswith("oracle.")]
    return content_id("oracle", config.oracle.science_json(), load_rubric(config.rubric).version, *read)


def _most_responses(study: StudyConfig, config: RunConfig, contact_oracle: bool) -> tuple[int, int]:
    """Count the responses of a pool to be made, and those that labels may be chosen from, after a run's own refusals.

    Those of a policy are an upper bound: how many are left after empty ones and repeats are dropped is not known yet.
    """
    plan = check(config, contact_oracle=contact_oracle)
    if config.generate.source == "seed":
        from rayrl.stages.selection.candidates import count_seed_responses

        counts = count_seed_responses(config)
        return sum(counts.values()), min(
            sum(num for prompt_id, num in counts.items() if prompt_id not in held_out)
            for held_out in _splits(study, list(counts))
        )
    num_held_out = len(held_out_prompts([str(number) for number in range(plan.num_prompts)], study.held_out, 0))
    return plan.num_responses, plan.num_responses - num_held_out * config.generate.k


def _splits(study: StudyConfig, prompt_ids: Sequence[str]) -> list[set[str]]:
    """Return the held-out prompts of every split."""
    seeds = study.seeds if study.split == "seed" else [0]
    return [held_out_prompts(prompt_ids, study.held_out, seed) for seed in seeds]


def _num_choosable(study: StudyConfig, pool: StudyPool) -> int:
    """Count the responses that labels may be chosen from with every seed."""
    seeds = study.seeds if study.split == "seed" else [0]
    return min(int((~pool.held_out(study.held_out, seed)).sum()) for seed in seeds)


def _num_queries(study: StudyConfig, num_responses: int, num_choosable: int) -> int:
    """Bound the labels that all cells together ask for. A response is asked about once."""
    if study.ceiling:
        return num_responses
    num_splits = len(study.seeds) if study.split == "seed" else 1
    num_held_out = num_splits * (num_responses - num_choosable)
    num_chosen = sum(study.budgets) * len(study.arms) * len(study.seeds) * len(study.points())
    return min(num_responses, num_held_out + num_chosen)


def _asked_first(study: StudyConfig, pool: StudyPool) -> list[int]:
    """Ids of the responses that every cell of a seed needs: all of them with the ceiling, else the held-out ones."""
    if study.ceiling:
        return pool.ids.tolist()
    seeds = study.seeds if study.split == "seed" else [0]
    needed = np.any([pool.held_out(study.held_out, seed) for seed in seeds], axis=0)
    return pool.ids[needed].tolist()


def _identity(study: StudyConfig) -> str:
    """Return the id by which the ledger knows the study's questions; the same at every start."""
    folder = storage.absolute(study.study_dir)
    if not identity(folder):
        storage.write_json(storage.join(folder, IDENTITY), {"id": uuid.uuid4().hex})
    return identity(folder)
