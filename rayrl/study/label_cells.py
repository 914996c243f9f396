"""Cells of a study of labels: choose labels from the pool, fit an evaluator on them, compare it with the oracle.

A cell reads the shared pool and asks for labels; nothing else. Its result depends on its `Job` and on the oracle alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from rayrl.algorithms.acquisition import Acquisition, Answers, acquire
from rayrl.algorithms.agreement import MEASURES, by_prompt
from rayrl.algorithms.heads import fit_heads, mean_and_spread
from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards
from rayrl.errors import DataError
from rayrl.records import content_id, drawn_seed
from rayrl.study.labels import Ask
from rayrl.study.pool import STRIDE, StudyPool
from rayrl.study.results import Cell, Measured, counted, estimated

NOTHING, LENGTH, EVERYTHING = "no labels", "length alone", "everything"
"""Controls: a proxy that knows nothing, one that prefers longer responses, and one that has all labels."""
CONTROLS = (NOTHING, LENGTH, EVERYTHING)
VERSION = "2"
"""Raised by a change that changes results, of this file or of what it calls: heads, acquisition, selection and
agreement. Those that are kept are then made again."""

Evaluator = Callable[
    [StudyPool, Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], "Job"], Float64[np.ndarray, " all"]
]
"""(pool, rows of the labelled responses, their scores, job) to a score of every response of the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work of one cell."""

    cell: Cell
    held_out: float
    split_seed: int
    num_batches: int
    first: str | None
    """Strategy of the first batch, where the cell's reads the heads."""
    num_heads: int
    evaluator: str
    oracle: str
    """Names the oracle and its rubric."""
    pool: str
    """Key of the pool."""

    @property
    def key(self) -> str:
        """Name all that decides the result."""
        cell = self.cell
        parts = [VERSION, cell.arm, cell.budget, cell.seed, self.held_out, self.split_seed, self.num_batches]
        parts += [self.first, self.num_heads, self.evaluator, self.oracle, self.pool]
        return content_id("label cell", *map(str, parts))


def measure_cell(job: Job, pool: StudyPool, ask: Ask) -> list[Measured]:
    """Compare the evaluator of a cell with the oracle on the held-out prompts.

    Args:
        job: the cell.
        pool: the pool of `job.pool`.
        ask: answers, once for all cells.

    Raises:
        DataError: no label was answered, or the oracle tells no held-out responses apart.
    """
    started = time.monotonic()
    is_held_out = pool.held_out(job.held_out, job.split_seed)
    rows = np.flatnonzero(is_held_out)
    predicted, facts = _predicted(job, pool, np.flatnonzero(~is_held_out), ask)
    oracle = _scores(ask(pool.ids[rows].tolist()))
    prompts, lengths = pool.prompts[rows], pool.lengths[rows]
    measured: list[Measured] = []
    for name, measure in MEASURES.items():
        found = by_prompt(measure, predicted[rows], oracle, prompts, lengths)
        if not found:
            raise DataError(
                f"{name} needs a held-out prompt with two responses that the oracle tells apart, and there is none; "
                "raise held_out, or use an oracle with finer scores"
            )
        values = {pool.prompt_ids[number]: value for number, value in found.items()}
        measured.append(estimated(name, values))
    return [*measured, *facts, counted("seconds", time.monotonic() - started)]


def _predicted(
    job: Job, pool: StudyPool, choosable: Int64[np.ndarray, " n"], ask: Ask
) -> tuple[Float64[np.ndarray, " all"], list[Measured]]:
    """Score every response of the pool by the cell's proxy; with what its labels were."""
    match job.cell.arm:
        case "no labels":
            return np.zeros(len(pool.ids)), [counted("labels", 0)]
        case "length alone":
            return np.log1p(pool.lengths), [counted("labels", 0)]
        case "everything":
            ids = pool.ids[choosable]
            scores = _scores(ask(ids.tolist()))
        case _:
            ids, scores = choose_labels(job, pool, choosable, ask)
    is_scored = ~np.isnan(scores)
    if not is_scored.any():
        raise DataError(f"none of {len(ids)} labels was answered: the oracle abstained from all; see `rayrl ledger`")
    rows = np.searchsorted(pool.ids, ids[is_scored])
    facts = [
        counted("labels", int(is_scored.sum())),
        counted("abstained", int((~is_scored).sum())),
        counted("label mean", float(scores[is_scored].mean())),
        counted("label deviation", float(scores[is_scored].std())),
    ]
    return EVALUATORS[job.evaluator](pool, rows, scores[is_scored], job), facts


def choose_labels(
    job: Job, pool: StudyPool, choosable: Int64[np.ndarray, " n"], ask: Ask
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Choose a cell's labels as a run would, in batches; return ids and scores, NaN where the oracle abstained."""
    ids = pool.ids[choosable]

    def answer(questions: Int64[np.ndarray, "m u"]) -> Answers:
        scores = ask(questions[:, 0].tolist())
        # Abstentions too: another cell may have paid for them, and a result depends on no other cell.
        return Answers(scores=scores, num_spent=len(scores))

    acquisition = Acquisition(
        strategy=STRATEGIES[job.cell.arm],
        first=STRATEGIES[job.first] if job.first is not None else None,
        num_batches=job.num_batches,
        num_heads=job.num_heads,
        knowledge=Knowledge(seed=drawn_seed("study", str(job.cell.seed)), prompt_stride=STRIDE),
    )
    shards = LocalShards([CoresetShard(ids, pool.vectors[choosable])])
    labels = acquire(ids, shards, acquisition, job.cell.budget, answer)
    return labels.ids[:, 0], labels.scores


def _scores(answers: Sequence[float | None]) -> Float64[np.ndarray, " n"]:
    return np.array([np.nan if answer is None else answer for answer in answers], np.float64)


def fitted_heads(
    pool: StudyPool, rows: Int64[np.ndarray, " n"], scores: Float64[np.ndarray, " n"], job: Job
) -> Float64[np.ndarray, " all"]:
    """Score by the mean of an ensemble of heads on the vectors."""
    seed = drawn_seed("study evaluator", str(job.cell.seed))
    heads = fit_heads(pool.vectors[rows], scores, pool.prompts[rows], num_heads=job.num_heads, seed=seed)
    return mean_and_spread(heads.scores(pool.vectors))[0]


EVALUATORS: dict[str, Evaluator] = {"head": fitted_heads}
"""Values of `evaluator` in a study. Another kind, such as the run's own small trained head ("scalar"), is a function of
what `fitted_heads` takes, and an entry here and in `StudyConfig.evaluator`."""
