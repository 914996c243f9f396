"""Cells of a study of labels: choose labels from the pool, fit an evaluator on them, compare it with the oracle.

A cell reads the shared pool and asks for labels; nothing else. Its result depends on its `Job` and on the oracle alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from rayrl.algorithms.acquisition import TIE, Acquisition, Answers, Labels, acquire
from rayrl.algorithms.agreement import COMPARISON_MEASURES, MEASURES, Measure, by_prompt, comparisons_by_prompt
from rayrl.algorithms.heads import fit_heads, fit_pair_heads, mean_and_spread
from rayrl.algorithms.selection import STRATEGIES, CoresetShard, Knowledge, LocalShards
from rayrl.errors import DataError
from rayrl.records import content_id, drawn_seed
from rayrl.study.config import Asks
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
    [StudyPool, Int64[np.ndarray, "n u"], Float64[np.ndarray, " n"], "Job"], Float64[np.ndarray, " all"]
]
"""(pool, rows of the labelled responses or pairs, their labels, job) to a score of every response of the pool; NaN of
those that it does not score, which are left out of the comparison."""


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
    """Names what is fitted: "head", or a training with all that decides it."""
    oracle: str
    """Names the oracle, its rubric, and the answers that the evaluator is compared with."""
    pool: str
    """Key of the pool, which also says what is asked about."""
    asks: Asks = "responses"
    has_scores: bool = True
    """Whether there are scores of the held-out responses to compare with; of a study of comparisons a table's."""

    @property
    def key(self) -> str:
        """Name all that decides the result."""
        cell = self.cell
        parts = [VERSION, cell.arm, cell.budget, cell.seed, self.held_out, self.split_seed, self.num_batches]
        parts += [self.first, self.num_heads, self.evaluator, self.oracle, self.pool]
        return content_id("label cell", *map(str, parts))


def measure_cell(job: Job, pool: StudyPool, ask: Ask, evaluator: Evaluator | None = None) -> list[Measured]:
    """Compare the evaluator of a cell with the oracle on the held-out prompts.

    Args:
        job: the cell.
        pool: the pool of `job.pool`.
        ask: answers, once for all cells.
        evaluator: fits and scores; None is that of `EVALUATORS`.

    Raises:
        DataError: no label was answered, or the oracle tells no held-out responses apart.
    """
    started = time.monotonic()
    is_held_out = pool.held_out(job.held_out, job.split_seed)
    rows = np.flatnonzero(is_held_out)
    predicted, facts = _predicted(job, pool, np.flatnonzero(~is_held_out), ask, evaluator)
    measured: list[Measured] = []
    if job.asks == "pairs":
        measured += _against_comparisons(pool, rows, predicted, ask)
    if job.has_scores:
        measured += _against_scores(pool, rows, predicted, ask)
    if num_unread := int(np.isnan(predicted[rows]).sum()):
        facts.append(counted("unread", num_unread))
    return [*measured, *facts, counted("seconds", time.monotonic() - started)]


def _against_scores(
    pool: StudyPool, rows: Int64[np.ndarray, " n"], predicted: Float64[np.ndarray, " all"], ask: Ask
) -> list[Measured]:
    if pool.is_repeat is not None:
        rows = rows[~pool.is_repeat[rows]]
    rows = rows[~np.isnan(predicted[rows])]
    oracle = _labels(ask(pool.ids[rows, None], held_out=True))

    def found(measure: Measure) -> dict[int, float]:
        return by_prompt(measure, predicted[rows], oracle, pool.prompts[rows], pool.lengths[rows])

    return _measured(pool, MEASURES, found)


def _against_comparisons(
    pool: StudyPool, rows: Int64[np.ndarray, " n"], predicted: Float64[np.ndarray, " all"], ask: Ask
) -> list[Measured]:
    questions = pool.questions(rows, "pairs")
    wins = _labels(ask(questions, held_out=True))
    compared = np.searchsorted(pool.ids[rows], questions)

    def found(measure: Measure) -> dict[int, float]:
        prompts, lengths = pool.prompts[rows], pool.lengths[rows]
        return comparisons_by_prompt(measure, predicted[rows], compared, wins, prompts, lengths)

    return _measured(pool, COMPARISON_MEASURES, found)


def _measured(
    pool: StudyPool, measures: Mapping[str, Measure], values_of: Callable[[Measure], dict[int, float]]
) -> list[Measured]:
    """Take measures by prompt.

    Raises:
        DataError: one of them is defined on no prompt.
    """
    measured: list[Measured] = []
    for name, measure in measures.items():
        found = values_of(measure)
        if not found:
            raise DataError(
                f"{name} needs a held-out prompt with two responses that the oracle tells apart, and there is none; "
                "raise held_out, or use an oracle with finer scores"
            )
        measured.append(estimated(name, {pool.prompt_ids[number]: value for number, value in found.items()}))
    return measured


def _predicted(
    job: Job, pool: StudyPool, choosable: Int64[np.ndarray, " n"], ask: Ask, evaluator: Evaluator | None
) -> tuple[Float64[np.ndarray, " all"], list[Measured]]:
    """Score every response of the pool by the cell's proxy; with what its labels were."""
    match job.cell.arm:
        case "no labels":
            return np.zeros(len(pool.ids)), [counted("labels", 0)]
        case "length alone":
            return np.log1p(pool.lengths), [counted("labels", 0)]
        case "everything":
            questions = pool.questions(choosable, job.asks)
            labels = Labels().with_answers(questions, ask(questions))
        case _:
            labels = choose_labels(job, pool, choosable, ask)
    scores = labels.scores[labels.answered]
    facts = [counted("labels", len(scores)), counted("abstained", len(labels.ids) - len(scores))]
    teaching = labels.answered
    if job.asks == "pairs":
        teaching = teaching[scores != TIE]
        facts.append(counted("ties", len(scores) - len(teaching)))
    elif len(scores):
        facts += [counted("label mean", float(scores.mean())), counted("label deviation", float(scores.std()))]
    if not len(teaching):
        ties = " or tied" if job.asks == "pairs" else ""
        raise DataError(
            f"none of {len(labels.ids)} labels was answered: the oracle abstained from{ties} all; see `rayrl ledger`"
        )
    fit = evaluator or EVALUATORS[job.evaluator, job.asks]
    rows = np.searchsorted(pool.ids, labels.ids[teaching])
    return fit(pool, rows, labels.scores[teaching], job), facts


def choose_labels(job: Job, pool: StudyPool, choosable: Int64[np.ndarray, " n"], ask: Ask) -> Labels:
    """Choose a cell's labels as a run would, in batches."""
    ids = pool.ids[choosable]

    def answer(questions: Int64[np.ndarray, "m u"]) -> Answers:
        scores = ask(questions)
        # Abstentions too: another cell may have paid for them, and a result depends on no other cell.
        return Answers(scores=scores, num_spent=len(scores))

    acquisition = Acquisition(
        strategy=STRATEGIES[job.cell.arm],
        first=STRATEGIES[job.first] if job.first is not None else None,
        num_batches=job.num_batches,
        num_heads=job.num_heads,
        knowledge=Knowledge(seed=drawn_seed("study", str(job.cell.seed)), prompt_stride=STRIDE),
    )
    return acquire(ids, LocalShards([CoresetShard(ids, pool.vectors[choosable])]), acquisition, job.cell.budget, answer)


def _labels(answers: Sequence[float | None]) -> Float64[np.ndarray, " n"]:
    return np.array([np.nan if answer is None else answer for answer in answers], np.float64)


def fitted_heads(
    pool: StudyPool, rows: Int64[np.ndarray, "n 1"], scores: Float64[np.ndarray, " n"], job: Job
) -> Float64[np.ndarray, " all"]:
    """Score by the mean of an ensemble of heads on the vectors."""
    (of_response,) = rows.T
    seed = drawn_seed("study evaluator", str(job.cell.seed))
    heads = fit_heads(pool.vectors[of_response], scores, pool.prompts[of_response], num_heads=job.num_heads, seed=seed)
    return mean_and_spread(heads.scores(pool.vectors))[0]


def fitted_pair_heads(
    pool: StudyPool, rows: Int64[np.ndarray, "n 2"], wins: Float64[np.ndarray, " n"], job: Job
) -> Float64[np.ndarray, " all"]:
    """Score by the mean of an ensemble of heads that is fitted on comparisons."""
    first, second = rows.T
    seed = drawn_seed("study evaluator", str(job.cell.seed))
    differences = pool.vectors[first] - pool.vectors[second]
    heads = fit_pair_heads(differences, wins > TIE, pool.prompts[first], num_heads=job.num_heads, seed=seed)
    return mean_and_spread(heads.scores(pool.vectors))[0]


EVALUATORS: dict[tuple[str, Asks], Evaluator] = {
    ("head", "responses"): fitted_heads,
    ("head", "pairs"): fitted_pair_heads,
}
"""What fits a cell in a process of its own, by the study's `evaluator` and what its strategies ask about.
`rayrl.study.scalar_cells` trains the other one, "scalar"."""
