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

from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.metrics.progress import track
from rayrl.models.judge_prompt import load_rubric
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.preflight.oracle_tables import inspect_oracle_tables
from rayrl.preflight.workload import TEST_BUDGET
from rayrl.runs import storage
from rayrl.runs.run import IDENTITY, identity, ledger_url
from rayrl.study.comparisons_table import num_comparisons, pool_of_comparisons, texts_of
from rayrl.study.config import SCALAR_EVALUATOR, Point, StudyConfig
from rayrl.study.label_cells import CONTROLS, EVERYTHING, Job
from rayrl.study.label_configs import (
    asking_config,
    check_answers,
    check_cell,
    comparisons_of,
    evaluator_key,
    fit_config,
    has_scores,
    name_of_pool,
    oracle_key,
    order_of,
    pool_config,
)
from rayrl.study.ledger import note_ledger
from rayrl.study.pool import (
    PoolCounts,
    StudyPool,
    held_out_prompts,
    pool_counts,
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
    asking: dict[Point, RunConfig]
    """Of a run that would choose and ask as the cells of a point of the grid do."""
    pools: dict[Point, RunConfig]
    """Of the run that makes the pool, by point."""
    tables: dict[str, pa.Table | None]
    """Pools of responses by key; None for one that has to be made."""
    counts: PoolCounts
    """Of the pool, at most."""
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
    asking = {point: asking_config(study, point) for point in study.points()}
    first = asking[study.points()[0]]
    check_answers(study, first)
    for point in study.points():
        for strategy in study.arms:
            check_cell(study, point, strategy)
    pools = {point: pool_config(study, point, asking[point]) for point in study.points()}
    keys = {point: pool_key(study, config) for point, config in pools.items()}
    tables = {key: _known_table(study, key) for key in keys.values()}
    known = next((table for table in tables.values() if table is not None), None)
    if known is not None:
        inspect_oracle_tables(first, [])
        counts = _counts(study, _study_pool(study, first, "", known))
    else:
        counts = _most_questions(study, first, pools[study.points()[0]], contact_oracle)
    is_exact = known is not None or pools[study.points()[0]].generate.source == "seed"
    refuse_small_pool(study, counts.num_choosable, is_exact=is_exact)
    num_queries = _num_queries(study, first, counts)
    if study.max_queries is not None and num_queries > study.max_queries:
        raise ConfigError(
            f"max_queries must cover the study, which may ask for {num_queries:,} labels"
            f"{' (ceiling = true labels everything)' if study.ceiling else ''}, got {study.max_queries:,}; raise it, "
            'lower budgets or held_out, use split = "study", or set ceiling = false'
        )
    jobs = [_job(study, asking[cell.point], keys[cell.point], cell) for cell in _cells(study)]
    return LabelPlan(
        study=study,
        asking=asking,
        pools=pools,
        tables=tables,
        counts=counts,
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
    config = next(iter(plan.asking.values()))
    tables = {
        key: table if table is not None else _made_table(plan, key, stopping) for key, table in plan.tables.items()
    }
    pools = {name_of_pool(study, key): _study_pool(study, config, key, table) for key, table in tables.items()}
    responses = _asked_about(study, config, next(iter(tables.values())))
    for table in tables.values():
        same = _asked_about(study, config, table)["response_id"].equals(responses["response_id"])
        assert same, "pools of one study have the same responses"
    pool = next(iter(pools.values()))
    refuse_small_pool(study, _counts(study, pool).num_choosable, is_exact=True)
    num_labels = study.max_queries or round(plan.num_queries * (1 + SPARE_LABELS)) + 1
    budgets = {"label": num_labels, "evaluate": 0, "test": TEST_BUDGET}
    ledger, rubric = ledger_url(storage.absolute(study.study_dir), config), load_rubric(config.rubric)
    note_ledger(study, ledger)
    with ExitStack() as ends:
        if study.evaluator == SCALAR_EVALUATOR:
            from rayrl.study.scalar_cells import ScalarFits

            pool_of_first = next(iter(plan.pools.values()))
            fits = ends.enter_context(ScalarFits.started(fit_config(study, pool_of_first), budgets, stopping))
            oracle = fits.oracle
        else:
            fits = None
            oracle = start_oracle_pool(
                study.name, config.oracle, rubric=rubric, ledger=ledger, budgets=budgets, run=_identity(study)
            )
            ends.callback(end_oracle_pool, oracle)
            if stopping is not None:
                ends.enter_context(stopping.first(partial(stop_asking, oracle)))
        labels = start_labels(oracle, responses, order_of(study, config), study.truth, rubric)
        label_all(labels, _asked_first(study, pool))
        if study.asks == "pairs" and study.truth is None and has_scores(study, config):
            label_all(labels, pool.questions(np.arange(len(pool.ids)), "responses"))
        if fits is not None:
            response_ids = responses["response_id"].to_pylist()
            running = fits.run_jobs(missing, pools, response_ids, labels, study.study_dir)
        else:
            shared: dict[str, Any] = {key: ray.put(each) for key, each in pools.items()}
            running = run_jobs(missing, shared, labels, study.study_dir, study.resources)
        return list(track(running, "cells", total=len(missing)))


def _made_table(plan: LabelPlan, key: str, stopping: Stopping | None) -> pa.Table:
    from rayrl.study.pool_stages import make_pool

    point = next(point for point, config in plan.pools.items() if pool_key(plan.study, config) == key)
    # Loaded again: a pool that was made meanwhile gives what it has in common with this one.
    config = pool_config(plan.study, point, plan.asking[point])
    table = make_pool(config, comparisons_of(plan.study, plan.asking[point]), stopping)
    write_pool_table(plan.study, key, table)
    return table


def _asked_about(study: StudyConfig, config: RunConfig, table: pa.Table) -> pa.Table:
    """Return the pool that cells see: of the table's comparisons, where there is one."""
    compared = comparisons_of(study, config)
    return table if compared is None else pool_of_comparisons(table, compared)


def _study_pool(study: StudyConfig, config: RunConfig, key: str, table: pa.Table) -> StudyPool:
    return study_pool(key, _asked_about(study, config, table))


def _known_table(study: StudyConfig, key: str) -> pa.Table | None:
    """Read a pool that is kept, or comes with the study."""
    return read_pool_table(study, key) if study.vectors is None else read_vectors(study.vectors)


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
        evaluator=evaluator_key(study, config),
        oracle=oracle_key(study, config),
        pool=name_of_pool(study, pool),
        asks=study.asks,
        has_scores=has_scores(study, config),
    )


def _most_questions(study: StudyConfig, asking: RunConfig, pool: RunConfig, contact_oracle: bool) -> PoolCounts:
    """Count the questions of a pool to be made, after a run's own refusals.

    Those of a policy are an upper bound: how many are left after empty ones and repeats are dropped is not known yet.
    """
    plan = check(pool, contact_oracle=contact_oracle)
    compared = comparisons_of(study, asking)
    if compared is not None:
        nums = num_comparisons(texts_of(pool, compared), compared)
        sizes = {prompt_id: [2] * num for prompt_id, num in nums.items()}
    elif pool.generate.source == "seed":
        from rayrl.stages.selection.candidates import count_seed_responses

        sizes = {prompt_id: [num] for prompt_id, num in count_seed_responses(pool).items()}
    else:
        sizes = {str(number): [pool.generate.k] for number in range(plan.num_prompts)}
    return pool_counts(sizes, _splits(study, list(sizes)), study.asks)


def _splits(study: StudyConfig, prompt_ids: Sequence[str]) -> list[set[str]]:
    """Return the held-out prompts of every split."""
    return [held_out_prompts(prompt_ids, study.held_out, seed) for seed in _split_seeds(study)]


def _split_seeds(study: StudyConfig) -> list[int]:
    return study.seeds if study.split == "seed" else [0]


def _counts(study: StudyConfig, pool: StudyPool) -> PoolCounts:
    sizes = pool.sizes()
    return pool_counts(sizes, _splits(study, list(sizes)), study.asks)


def _num_queries(study: StudyConfig, config: RunConfig, counts: PoolCounts) -> int:
    """Bound the queries that all cells together ask for. A response, or a pair, is asked about once."""
    num_chosen = sum(study.budgets) * len(study.arms) * len(study.seeds) * len(study.points())
    num_held_out = 0 if study.truth is not None else len(_split_seeds(study)) * counts.num_held_out
    num_first = counts.num_questions if study.ceiling else num_held_out
    num_questions = min(counts.num_possible, num_first + num_chosen)
    if study.asks == "responses":
        return num_questions
    num_scores = counts.num_responses if study.truth is None and has_scores(study, config) else 0
    return num_questions * queries_per_pair(order_of(study, config)) + num_scores


def _asked_first(study: StudyConfig, pool: StudyPool) -> Any:
    """Return the questions that every cell of a seed needs: all with the ceiling, else of the held-out prompts."""
    rows = np.arange(len(pool.ids))
    if not study.ceiling:
        held_out = np.any([pool.held_out(study.held_out, seed) for seed in _split_seeds(study)], axis=0)
        rows = rows[held_out] if study.truth is None else rows[:0]
    return pool.questions(rows, study.asks)


def _identity(study: StudyConfig) -> str:
    """Return the id by which the ledger knows the study's questions; the same at every start."""
    folder = storage.absolute(study.study_dir)
    if not identity(folder):
        storage.write_json(storage.join(folder, IDENTITY), {"id": uuid.uuid4().hex})
    return identity(folder)
