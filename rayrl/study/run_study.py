"""Study of runs, from its config to the outcomes of its cells: each is a run of the pipeline in a folder of its own.

Runs follow each other in this process: each uses the whole cluster through its fleets and trainings, and one at a time
may own the ledger that they share. The first cell of a seed does the stages that all have in common.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rayrl.config import RunConfig
from rayrl.errors import BudgetExhausted, ConfigError, DiskFull, JudgeFailed, ResourceError, WaitingForPeople
from rayrl.oracles.user_modules import check_function, found_first
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.content import contents_of
from rayrl.runs.run import CONFIG, LEDGER, ledger_url, open_run, read_manifest, round_name
from rayrl.runs.stage_metrics import M1
from rayrl.runs.stage_table import EVALUATE
from rayrl.study.config import StudyConfig, VariantConfig, leaves, run_config
from rayrl.study.ledger import note_ledger
from rayrl.study.results import (
    CELLS,
    Cell,
    GoldPoint,
    Measured,
    Outcome,
    outcome_of,
    read_gold,
    read_result,
    write_gold,
)

if TYPE_CHECKING:
    from rayrl.pipelines.run_pipeline import Pipeline

logger = logging.getLogger(__name__)

FATAL = (BudgetExhausted, DiskFull, JudgeFailed, ResourceError, WaitingForPeople)
"""Errors that the next run would meet as well: they end the study, which the same command continues."""
VERSION = "1"
"""Raised by a change of `rayrl.study.run_measures` that changes results."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """Work of one cell: a run, and the policy of it that is measured."""

    cell: Cell
    config: RunConfig
    settings: tuple[tuple[str, object], ...]
    """Those that make the config of the base config and the study's."""
    reuse: str | None
    """Folder of the run whose finished stages it takes over; it may not be there yet."""
    pipeline: str | None
    """"module:function" in place of the config's."""
    policy: str
    run_key: str
    """Names the run by all that decides its outcome; cells that measure other policies of it share it."""
    gold_answers: int = 0
    """Answers that the gold expert scores at each measured step of the policy's PPO."""
    num_queries: int = 0
    """Queries that the run may pay for: labels, and those of the evaluation; known once it is checked."""

    @property
    def key(self) -> str:
        """Name all that decides the result."""
        gold = [f"gold {self.gold_answers}"] if self.gold_answers else []
        return content_id("run cell", VERSION, self.run_key, self.policy, *gold)


def plan_runs(study: StudyConfig, *, contact_oracle: bool = False) -> list[RunJob]:
    """Refuse a study of which a run cannot end well, or list its cells. Starts nothing.

    Raises:
        ConfigError, DataError, ResourceError, RunDirectoryError: one message: field, rule, value, remedy.
    """
    jobs = _jobs(study)
    if study.gold_answers:
        _check_gold(jobs)
    queries: dict[str, int] = {}
    for job in jobs:
        if job.cell.seed == study.seeds[0] and job.run_key not in queries:
            try:
                plan = check(job.config, contact_oracle=contact_oracle and not queries)
            except ConfigError as error:
                raise ConfigError(f"{job.cell.title}: {error}") from None
            queries[job.run_key] = plan.budgets["label"] + plan.budgets["evaluate"]
            if job.pipeline is not None:
                check_function(job.pipeline, f"variants.{job.cell.arm}.pipeline")
    # Seeds differ in nothing that is refused, and in no budget.
    of_first_seed = {job.cell: queries[job.run_key] for job in jobs if job.cell.seed == study.seeds[0]}
    jobs = [replace(job, num_queries=of_first_seed[replace(job.cell, seed=study.seeds[0])]) for job in jobs]
    if study.max_queries is not None and num_queries(jobs) > study.max_queries:
        raise ConfigError(
            f"max_queries must cover the study, whose {len({job.run_key for job in jobs})} runs may ask for "
            f"{num_queries(jobs):,} labels and answers of their evaluation, got {study.max_queries:,}; raise it, lower "
            "budgets or evaluate.budget, or leave out seeds or rows"
        )
    return jobs


def _check_gold(jobs: list[RunJob]) -> None:
    """Refuse gold scores of an expert who is paid, and of runs without PPO."""
    for job in jobs:
        asked = f"gold_answers must be 0 where {{}}, got {job.gold_answers}; {{}}"
        if not job.config.oracle.is_free():
            raise ConfigError(
                asked.format(
                    f'oracle.type is "{job.config.oracle.type}", which may be paid: these scores are outside of every '
                    "budget",
                    'set oracle.type = "scripted", or leave it out',
                )
            )
        if job.config.pipeline != "rlp":
            raise ConfigError(
                asked.format(f'pipeline is "{job.config.pipeline}", which has no PPO', "leave it out, or take rlp")
            )


def num_queries(jobs: list[RunJob]) -> int:
    """Bound the queries that all runs together pay for. Cells of one run share them."""
    return sum({job.run_key: job.num_queries for job in jobs}.values())


def missing_runs(study: StudyConfig, jobs: list[RunJob]) -> list[RunJob]:
    """Return the cells that have no result yet."""
    return [job for job in jobs if _known(study, job) is None]


def _known(study: StudyConfig, job: RunJob) -> Outcome | None:
    """Read what became of a cell; None if that is not known, or not whole."""
    measured = read_result(study.study_dir, job.key)
    gold = read_gold(study.study_dir, job.key) if job.gold_answers else []
    if measured is None or gold is None:
        return None
    return Outcome(cell=job.cell, key=job.key, measured=measured, gold=gold)


def run_runs(study: StudyConfig, jobs: list[RunJob], stopping: Stopping | None) -> Iterator[Outcome]:
    """Run the cells, one after the other, and yield their outcomes. A run that fails ends no other.

    Raises:
        JudgeFailed and others of `FATAL`: no run could go on.
    """
    note_ledger(study, ledger_url(storage.absolute(jobs[0].config.run_dir), jobs[0].config))
    for number, job in enumerate(jobs, 1):
        known = _known(study, job)
        if known is not None:
            yield known
            continue
        logger.info("cell %d of %d: %s", number, len(jobs), job.cell.title)
        yield _run(study, job, stopping)


def _run(study: StudyConfig, job: RunJob, stopping: Stopping | None) -> Outcome:
    # Only here: it imports Ray.
    from rayrl.study.gold import measure_gold
    from rayrl.study.run_measures import measure_run

    gold: list[GoldPoint] = []

    def measure() -> list[Measured]:
        folder = _finish(study, job, stopping)
        if job.gold_answers:
            gold.extend(measure_gold(folder, job.config, job.policy, job.gold_answers))
            write_gold(study.study_dir, job.key, gold)
        return measure_run(folder, job.policy, job.config.rounds)

    return replace(outcome_of(job.cell, job.key, study.study_dir, measure, fatal=FATAL), gold=gold)


def _finish(study: StudyConfig, job: RunJob, stopping: Stopping | None) -> str:
    """Run a cell's pipeline to its evaluation, unless that is done; return the run's folder."""
    from rayrl.pipelines.run_pipeline import run_pipeline

    url = storage.absolute(job.config.run_dir)
    if read_manifest(url, EVALUATE) is not None:
        return open_run(job.config).url
    config = job.config
    if job.reuse is not None and storage.exists(storage.join(job.reuse, CONFIG)):  # that run may have failed at once
        config = run_config(study, *job.settings, ("reuse", job.reuse))
    run_pipeline(config, check(config), _pipeline(job), ray_start_s=0.0, stopping=stopping)
    return url


def _pipeline(job: RunJob) -> "Pipeline":
    """Import the pipeline of a cell; the working directory comes first."""
    named = job.pipeline or f"rayrl.pipelines.{job.config.pipeline}:{job.config.pipeline}"
    module, _, function = named.partition(":")
    with found_first(os.getcwd()):
        return getattr(importlib.import_module(module), function)


def _cells(study: StudyConfig) -> list[Cell]:
    """List the cells: seeds outermost; the first of a seed does the stages that all have in common."""
    budgets = study.budgets or [run_config(study).select.budget]
    return [
        Cell(arm=arm, budget=budget, seed=seed, point=point)
        for seed in study.seeds
        for point in study.points()
        for budget in budgets
        for arm in _in_order_of_reuse(study)
    ]


def _in_order_of_reuse(study: StudyConfig) -> list[str]:
    """List the arms, those whose stages others take over before these."""
    order: list[str] = []

    def add(arm: str) -> None:
        reused = study.variants[arm].reuse if arm in study.variants else None
        if reused is not None and reused not in order and reused != arm:
            add(reused)
        if arm not in order:
            order.append(arm)

    for arm in study.arms:
        add(arm)
    return order


def policies_of(config: RunConfig) -> list[str]:
    """List the policies that the evaluation of a run tells of; the last one is what the run ends with."""
    if config.pipeline == "proxy_dpo":
        return [M1, "m2"]
    best_of_n = ["best_of_n"] if config.best_of_n else []
    if config.ppo.reward != "reward_model":
        return [M1, *best_of_n, "ppo"]
    rounds = range(1, config.rounds + 1)
    return [M1, *best_of_n, *(round_name(name, number) for number in rounds for name in ("ppo", "rlp"))]


def _policy(arm: str, variant: VariantConfig | None, config: RunConfig) -> str:
    """Return the policy that a cell measures.

    Raises:
        ConfigError: the run has no such policy.
    """
    known = policies_of(config)
    policy = None if variant is None else variant.policy
    # Another pipeline may have policies of its own.
    if policy is not None and policy not in known and (variant is None or variant.pipeline is None):
        remedy = "; set evaluate.best_of_n, or leave that row out" if policy == "best_of_n" else "; correct it"
        raise ConfigError(
            f'variants.{arm}.policy must be one of {", ".join(known)}, which its run evaluates, got "{policy}"{remedy}'
        )
    return policy or known[-1]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A cell's run before it has its place."""

    cell: Cell
    settings: tuple[tuple[str, object], ...]
    config: RunConfig
    key: str


def _jobs(study: StudyConfig) -> list[RunJob]:
    """Load the config of every cell's run, and give runs that are equal one folder."""
    runs = {cell: _run_of(study, cell) for cell in _cells(study)}
    folder = storage.join(storage.absolute(study.study_dir), CELLS)
    # A run keeps the folder that an earlier start has given it, whichever cell came first then.
    names = {name.rpartition("-")[2]: name for name in storage.children(folder)}
    for run in runs.values():
        names.setdefault(run.key, f"{run.cell.arm}-{run.cell.budget}-seed{run.cell.seed}-{run.key}")
    jobs: list[RunJob] = []
    for run in runs.values():
        name = names[run.key]
        placed: list[tuple[str, object]] = [("run_dir", storage.join(folder, name)), ("name", f"{study.name}-{name}")]
        if run.config.oracle.ledger is None:
            placed.append(("oracle.ledger", storage.join(storage.absolute(study.study_dir), LEDGER)))
        variant = study.variants.get(run.cell.arm)
        settings = (*run.settings, *placed)
        config = run_config(study, *settings)
        reused = names[runs[_reused(study, run.cell)].key]
        jobs.append(
            RunJob(
                cell=run.cell,
                config=config,
                settings=settings,
                reuse=None if reused == name else storage.join(folder, reused),
                pipeline=None if variant is None else variant.pipeline,
                policy=_policy(run.cell.arm, variant, config),
                run_key=run.key,
                gold_answers=study.gold_answers,
            )
        )
    return jobs


def _run_of(study: StudyConfig, cell: Cell) -> _Run:
    """Load the config of a cell, and name its run by all that decides the outcome."""
    variant = study.variants.get(cell.arm)
    own = [("select.strategy", cell.arm)] if variant is None else list(variant.set.items())
    # One that names the `type` of its table replaces the table, and must leave what the others set in it.
    merged = sorted([*cell.point, *own], key=lambda setting: not _names_type(*setting))
    settings: list[tuple[str, object]] = [*merged, ("select.budget", cell.budget), ("seed", cell.seed)]
    config = run_config(study, *settings)
    contents = contents_of(config, {})
    parts = [f"{setting} {contents[setting]}" for setting in sorted(contents)]
    pipeline = (variant.pipeline if variant else None) or ""
    key = content_id("run", config.science_json(), pipeline, *parts)
    return _Run(cell=cell, settings=tuple(settings), config=config, key=key)


def _names_type(dotted: str, value: object) -> bool:
    return any(name.rpartition(".")[2] == "type" for name, _ in leaves({dotted: value}))


def _reused(study: StudyConfig, cell: Cell) -> Cell:
    """Return the cell whose finished stages a cell takes over: the first one of its seed, if it names no other."""
    variant = study.variants.get(cell.arm)
    if variant is not None and variant.reuse is not None:
        return Cell(arm=variant.reuse, budget=cell.budget, seed=cell.seed, point=cell.point)
    return next(each for each in _cells(study) if each.seed == cell.seed)
