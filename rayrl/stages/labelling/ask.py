"""Questions to the oracle pool, chunk by chunk: judgements of single responses, comparisons of two, and what they cost.

The questions come back answered, as the same records. Nothing here is kept: the ledger has every paid answer, and
makes a repeated question free.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rayrl.errors import RayRLError, RunDirectoryError, StageTimeout
from rayrl.metrics.progress import track
from rayrl.oracles.ledger import Outlook
from rayrl.oracles.ledger_schema import REASON_CHARS
from rayrl.oracles.people.waiting import UNANSWERED
from rayrl.oracles.questions import Question
from rayrl.records import Comparison, Judgement, content_id
from rayrl.runs.stage_metrics import LedgerCounts
from rayrl.runs.stage_table import AnyStage

logger = logging.getLogger(__name__)

CHUNK = 64
MAX_REASONS = 5
"""Commonest reasons of abstentions that a manifest keeps."""
COUNT_TIMEOUT_S = 300.0
CHUNK_TIMEOUT_S = 6 * 3600.0
"""A chunk may wait for rate limits and retries; the pool bounds each call itself."""


def ask(oracle: ActorHandle, judgements: Sequence[Judgement], stage: AnyStage, *, describe: str) -> list[Judgement]:
    """Have the oracle pool judge responses, with a progress bar.

    Args:
        oracle: the pool.
        judgements: of the status "asked".
        stage: asks; the table says which budget pays.
        describe: title of the bar.

    Returns:
        The same judgements in the same order, scored or abstained.

    Raises:
        JudgeFailed: the oracle itself fails. What it has answered is in the ledger.
        StageTimeout: a chunk took hours.
    """
    return _in_chunks(oracle, oracle.judge, judgements, stage, describe)


def oracle_scores(
    oracle: ActorHandle, texts: Sequence[tuple[str, str, str]], stage: AnyStage, *, describe: str
) -> list[float | None]:
    """Score (prompt id, prompt, response) texts; None where the oracle abstains."""
    judgements: list[Judgement] = []
    for prompt_id, prompt, response in texts:
        # Held-out answers and references have no id of their own.
        response_id = content_id(prompt_id, response)
        judgements.append(Judgement(prompt_id=prompt_id, response_id=response_id, prompt=prompt, response=response))
    return [judgement.score for judgement in ask(oracle, judgements, stage, describe=describe)]


def ask_comparisons(
    oracle: ActorHandle, comparisons: Sequence[Comparison], stage: AnyStage, *, describe: str
) -> list[Comparison]:
    """Have the oracle pool compare responses, as `ask` has it judge them."""
    return _in_chunks(oracle, oracle.compare, comparisons, stage, describe)


def ledger_counts(oracle: ActorHandle) -> dict[str, LedgerCounts]:
    """Queries in the ledger, by purpose."""
    return wait_for(oracle.summary.remote(), "counting queries", COUNT_TIMEOUT_S)


def num_spent(oracle: ActorHandle, answers: Sequence[Judgement | Comparison]) -> int:
    """Count the label queries that these answers took, with calls lost on the way. Known answers took none."""
    keys = [answer.key for answer in answers]
    return wait_for(oracle.num_spent.remote(keys, "label"), "counting queries", COUNT_TIMEOUT_S)


def unpaid_questions(oracle: ActorHandle, answers: Sequence[Sequence[Judgement | Comparison]]) -> list[int]:
    """List the items that have no answer and cost nothing; `answers` are those to the questions about each item.

    What people have not answered by the end of the waiting is none of them: others in its place would have to be
    waited for again.
    """
    return [
        number
        for number, each in enumerate(answers)
        if not any(answer.status == "scored" or answer.rationale == UNANSWERED for answer in each)
        and num_spent(oracle, each) == 0
    ]


def abstention_reasons(rationales: Sequence[str]) -> dict[str, int]:
    """Count the commonest reasons, each cut to its beginning."""
    reasons = Counter(rationale[:REASON_CHARS] for rationale in rationales)
    return dict(reasons.most_common(MAX_REASONS))


def wait_for(asked: Any, describe: str, timeout_s: float) -> Any:
    """Wait for the oracle pool, and tell its errors in their own words instead of the actor's traceback.

    Raises:
        StageTimeout: no answer within `timeout_s`.
        RunDirectoryError: the pool's actor has ended.
    """
    try:
        return ray.get(asked, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RayRLError):
            raise error.cause from None
        raise
    except RayActorError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise RunDirectoryError(
            f"{describe}: the oracle pool ended and did not come back ({reason}); run the same command again: what was "
            "paid stays in the ledger"
        ) from None
    except GetTimeoutError:
        raise StageTimeout(
            f"{describe}: the oracle pool must answer within {timeout_s / 60:.0f} min, and has not; see its log, "
            "and run the same command again: what was paid stays in the ledger"
        ) from None


def _announce(outlook: Outlook, stage: AnyStage) -> None:
    """Say what was paid for other questions of this stage, before new ones are asked.

    Raises:
        RunDirectoryError: an input or the judge prompt has changed, and what its questions took is no more there for
            the new ones. Asked as far as the budget goes, a part would pass for the whole.
    """
    if outlook.num_reworded:
        logger.warning(
            "%s: %d answers to the earlier judge prompt, or of the earlier oracle, stay in the ledger; %d questions "
            "will be asked, %d are answered already",
            stage.name,
            outlook.num_reworded,
            outlook.num_new,
            outlook.num_known,
        )
    # An evaluation by fewer questions is the same one, with a larger error; by half of another judge's it is not.
    num_others = outlook.num_earlier if stage.pays == "label" else outlook.num_reworded
    if num_others and outlook.num_new > outlook.num_left + outlook.num_lost:
        raise RunDirectoryError(
            f"{stage.name}: {num_others} answers of this run were paid for other questions than it has now "
            f"(an input, the judge prompt or the oracle has changed since, see its log), {outlook.num_new} questions "
            f"would be asked, and its budget has {outlook.num_left} left. Nothing was asked. Set back what has "
            "changed; or choose another run_dir, with reuse = this one for the stages that stay the same and "
            "oracle.ledger = this run's ledger for the answers that are paid"
        )


def _in_chunks(
    oracle: ActorHandle, method: ActorMethod, questions: Sequence[Question], stage: AnyStage, describe: str
) -> list[Question]:
    """Send all chunks at once, and wait for them in order. The pool limits how many questions are asked at a time.

    People are asked about all of them in one call, once the judges beside them, if there are any, have answered.
    """
    if not questions:
        return []
    outlook: Outlook = wait_for(oracle.outlook.remote(questions, stage.pays, stage.name), describe, COUNT_TIMEOUT_S)
    _announce(outlook, stage)
    chunks = [questions[start : start + CHUNK] for start in range(0, len(questions), CHUNK)]
    pending: list[Any] = [
        method.remote(chunk, stage.pays, stage.name, by_people=not outlook.is_whole) for chunk in chunks
    ]
    answers: list[Question] = []
    for chunk in track(pending, describe):
        answers += wait_for(chunk, describe, CHUNK_TIMEOUT_S)
    if outlook.is_whole:  # what judges have answered is free now
        return wait_for(method.remote(questions, stage.pays, stage.name), describe, CHUNK_TIMEOUT_S)
    return answers
