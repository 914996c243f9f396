"""Study of labels, from its config to the outcomes of its cells: plan, pool, oracle, and the cells as Ray work."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import logging
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from rayrl.algorithms.comparisons import Order, queries_per_pair
from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import RunConfig
from rayrl.config.oracle import OracleTable
from rayrl.errors import ConfigError
from rayrl.metrics.progress import track
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.replay import read_answers
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.preflight.oracle_tables import inspect_oracle_tables
from rayrl.preflight.workload import TEST_BUDGET
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.content import Input, content_of, contents_of
from rayrl.runs.run import CONFIG, IDENTITY, LEDGER, identity, ledger_url
from rayrl.study.comparisons_table import num_comparisons, pool_of_comparisons, pool_settings, table_of, texts_of
from rayrl.study.config import LABEL_MEASURES, SCALAR_EVALUATOR, Point, StudyConfig, run_config
from rayrl.study.label_cells import CONTROLS, EVERYTHING, Job
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

ASKING: tuple[tuple[str, object], ...] = (
    *(("pipeline", "rlp"), ("preferences.source", "oracle"), ("ppo.reward", "reward_model")),
)
"""Settings by which a run asks for comparisons, as its study does, whatever base is for."""
NO_CHOICE: tuple[tuple[str, object], ...] = (
    *(("select.strategy", "random"), ("select.budget", 2), ("select.batches", 1), ("select.first_batch", None)),
)
"""Settings of the selection in a run of a study's own, which makes a pool or trains, and chooses nothing."""
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
    for point in study.points():
        for strategy in study.arms:
            _check_cell(study, point, strategy)
    asking = {point: asking_config(study, point) for point in study.points()}
    pools = {point: _pool_config(study, point, asking[point]) for point in study.points()}
    first = asking[study.points()[0]]
    _check_answers(study, first)
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
    pools = {_name_of_pool(study, key): _study_pool(study, config, key, table) for key, table in tables.items()}
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

            fits = ends.enter_context(ScalarFits.started(_fit_config(study, plan), budgets, stopping))
            oracle = fits.oracle
        else:
            fits = None
            oracle = start_oracle_pool(
                study.name, config.oracle, rubric=rubric, ledger=ledger, budgets=budgets, run=_identity(study)
            )
            ends.callback(end_oracle_pool, oracle)
            if stopping is not None:
                ends.enter_context(stopping.first(partial(stop_asking, oracle)))
        labels = start_labels(oracle, responses, _order(study, config), study.truth, rubric)
        label_all(labels, _asked_first(study, pool))
        if study.asks == "pairs" and study.truth is None and _has_scores(study, config):
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
    config = _pool_config(plan.study, point, plan.asking[point])
    table = make_pool(config, _comparisons(plan.study, plan.asking[point]), stopping)
    write_pool_table(plan.study, key, table)
    return table


def _comparisons(study: StudyConfig, config: RunConfig) -> OracleTable | None:
    """Return the table of comparisons that is the study's pool; None where another pool is asked about."""
    return table_of(config) if study.asks == "pairs" else None


def _asked_about(study: StudyConfig, config: RunConfig, table: pa.Table) -> pa.Table:
    """Return the pool that cells see: of the table's comparisons, where there is one."""
    compared = _comparisons(study, config)
    return table if compared is None else pool_of_comparisons(table, compared)


def _study_pool(study: StudyConfig, config: RunConfig, key: str, table: pa.Table) -> StudyPool:
    return study_pool(key, _asked_about(study, config, table))


def _known_table(study: StudyConfig, key: str) -> pa.Table | None:
    """Read a pool that is kept, or comes with the study."""
    return read_pool_table(study, key) if study.vectors is None else read_vectors(study.vectors)


def asking_config(study: StudyConfig, point: Point) -> RunConfig:
    """Load the config of a run that chooses and asks as the cells of a point do.

    Raises:
        ConfigError: the base config asks about something else than the strategies do, or no cell reads a setting.
    """
    # One that reads vectors and no heads goes with any setting of the others.
    choice = min(study.arms, key=lambda arm: (STRATEGIES[arm].reads_heads, not STRATEGIES[arm].reads_vectors))
    settings = [*point, ("select.strategy", choice), ("select.budget", study.budgets[-1])]
    if study.asks == "pairs":
        config = run_config(study, *settings, *ASKING)
        # A table has one order of each pair.
        return config if table_of(config) is None else run_config(study, *settings, *ASKING, _ONE_ORDER)
    config = run_config(study, *settings)
    if config.select.unit != "response" or config.asks_for_comparisons or not config.learns_from_judgements:
        raise ConfigError(
            'base must be a config whose oracle judges single responses (pipeline = "proxy_dpo", select.unit = '
            f'"response") where kind is "labels" and strategies ask for scores, got {study.base}; choose another, take '
            'strategies that ask for comparisons ("random_pairs", "delta_ucb"), or set kind = "runs"'
        )
    return config


_ONE_ORDER = ("preferences.order", "random")


def _check_answers(study: StudyConfig, config: RunConfig) -> None:
    """Refuse settings that no cell reads, answers that are not there, and an evaluator that base does not train."""
    for name, unset in (("seed_centers", False), ("stop_at", None)):
        if getattr(config.select, name) != unset:
            raise ConfigError(
                f'select.{name} must be left out where kind is "labels", got {getattr(config.select, name)!r}: no '
                'cell reads it; leave it out of base and [set], or set kind = "runs"'
            )
    if study.asks == "pairs" and (missing := config.oracle.missing_to_compare(config.rubric)):
        raise ConfigError(f"{missing}. The strategies of this study ask for comparisons")
    if study.truth is not None:
        holds = "comparisons" if study.asks == "pairs" else "judgements"
        if holds not in {table.holds for table in study.truth.tables()}:
            name = "comparisons_path" if study.asks == "pairs" else "path"
            raise ConfigError(
                f"truth.{name} is missing: the evaluator is compared with {holds} where strategies ask about "
                f"{study.asks}; name a table of them"
            )
        for table in study.truth.tables():
            read_answers(replace(table, setting=table.setting.replace("oracle.", "truth.")))
    unknown = [name for name in study.measures if name in LABEL_MEASURES]
    if unknown and not _has_scores(study, config):
        raise ConfigError(
            f'measures must be of comparisons where no table has scores, got "{unknown[0]}"; leave it out, or name '
            "judgements beside the comparisons: oracle.path"
        )
    if study.evaluator == SCALAR_EVALUATOR and config.evaluator.type != SCALAR_EVALUATOR:
        raise ConfigError(
            f'evaluator.type of base must be "{SCALAR_EVALUATOR}", whose settings are then trained with, where the '
            f'study\'s evaluator is, got "{config.evaluator.type}"; set.evaluator.type = "{SCALAR_EVALUATOR}"'
        )


def _has_scores(study: StudyConfig, config: RunConfig) -> bool:
    """Return whether there are scores of held-out responses to compare with: always, but for comparisons in a table."""
    if study.asks == "responses":
        return True
    tables = (config.oracle if study.truth is None else study.truth).tables()
    return any(table.holds == "judgements" for table in tables)


def _pool_config(study: StudyConfig, point: Point, asking: RunConfig) -> RunConfig:
    """Load the config of the run that samples and embeds the pool of a point. It chooses nothing."""
    folder = storage.absolute(study.study_dir)
    compared = _comparisons(study, asking)
    chosen: list[tuple[str, object]] = [*NO_CHOICE]
    if study.asks == "pairs":
        chosen += [*ASKING, ("select.strategy", "random_pairs"), ("refresh.method", "none"), ("rounds", 1)]
    if compared is not None:
        chosen += pool_settings(compared)
    config = run_config(study, *point, *chosen)
    # By its key: another grid, or an edited prompt file, is another pool beside this one.
    name = f"pool-{pool_key(study, config)}"
    settings: list[tuple[str, object]] = [("run_dir", storage.join(folder, name)), ("name", f"{study.name}-{name}")]
    first = f"pool-{pool_key(study, run_config(study, *study.points()[0], *chosen))}"
    if first != name and storage.exists(storage.join(folder, first, CONFIG)):
        settings.append(("reuse", storage.join(folder, first)))
    return run_config(study, *point, *chosen, *settings, *_shared_ledger(study, config))


def _fit_config(study: StudyConfig, plan: LabelPlan) -> RunConfig:
    """Load the config of the run in whose folder the cells train the scalar evaluator, on M1 of the pool's run."""
    point = study.points()[0]
    pool, config = plan.pools[point], plan.asking[point]
    name = f"fits-{content_id(pool_key(study, pool), config.evaluator.science_json())}"
    place = storage.join(storage.absolute(study.study_dir), name)
    settings: list[tuple[str, object]] = [("run_dir", place), ("name", f"{study.name}-{name}")]
    settings.append(("reuse", pool.run_dir))
    return run_config(study, *point, *NO_CHOICE, *settings, *_shared_ledger(study, config))


def _shared_ledger(study: StudyConfig, config: RunConfig) -> list[tuple[str, object]]:
    """Return the setting of the ledger that runs and cells of a study share, unless base names one."""
    folder = storage.absolute(study.study_dir)
    if config.oracle.ledger is not None or not storage.is_local(folder):
        return []
    return [("oracle.ledger", storage.join(folder, LEDGER))]


def _check_cell(study: StudyConfig, point: Point, strategy: str) -> None:
    """Refuse a strategy that the base config cannot have, such as one that reads labels and has none to begin with.

    Raises:
        ConfigError: the run's own refusal, and how a study sets what it asks for.
    """
    asking = ASKING if study.asks == "pairs" else ()
    try:
        run_config(study, *point, ("select.strategy", strategy), ("select.budget", study.budgets[-1]), *asking)
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
        evaluator=_evaluator_key(study, config),
        oracle=oracle_key(study, config),
        pool=_name_of_pool(study, pool),
        asks=study.asks,
        has_scores=_has_scores(study, config),
    )


def _name_of_pool(study: StudyConfig, key: str) -> str:
    """Name a pool as cells see it: by what they ask about it, too."""
    return key if study.asks == "responses" else content_id("pairs", key)


def _evaluator_key(study: StudyConfig, config: RunConfig) -> str:
    """Name what is fitted; M1, which a training starts from, is named by the pool."""
    if study.evaluator != SCALAR_EVALUATOR:
        return study.evaluator
    return content_id(SCALAR_EVALUATOR, config.evaluator.science_json())


def oracle_key(study: StudyConfig, config: RunConfig) -> str:
    """Name an oracle, what it answers from, the rubric by which it judges, and the held-out answers beside it."""
    contents = contents_of(config, {})
    read = [f"{setting} {contents[setting]}" for setting in sorted(contents) if setting.startswith("oracle.")]
    if study.asks == "pairs":
        read.append(_order(study, config))
    if study.truth is not None:
        tables = [Input(setting=table.setting, place=table.path, kind="data") for table in study.truth.tables()]
        read += [study.truth.science_json(), *(content_of(table) or "" for table in tables)]
    return content_id("oracle", config.oracle.science_json(), load_rubric(config.rubric).version, *read)


def _order(study: StudyConfig, config: RunConfig) -> Order:
    """Return the order of comparisons; of single responses it is not read."""
    return config.preferences.order if study.asks == "pairs" and config.preferences is not None else "random"


def _most_questions(study: StudyConfig, asking: RunConfig, pool: RunConfig, contact_oracle: bool) -> PoolCounts:
    """Count the questions of a pool to be made, after a run's own refusals.

    Those of a policy are an upper bound: how many are left after empty ones and repeats are dropped is not known yet.
    """
    plan = check(pool, contact_oracle=contact_oracle)
    compared = _comparisons(study, asking)
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
    num_scores = counts.num_responses if study.truth is None and _has_scores(study, config) else 0
    return num_questions * queries_per_pair(_order(study, config)) + num_scores


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
