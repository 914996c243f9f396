"""Test question: one real question goes the whole way to the oracle before the first GPU second is spent."""

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from rayrl.errors import JudgeFailed, StageTimeout
from rayrl.records import Comparison, Judgement, Prompt, content_id
from rayrl.runs.run import Run

logger = logging.getLogger(__name__)

RESPONSES = ("I am not sure what you mean. Could you tell me more about what you need?", "No.")
"""No policy has answered yet: the first stands for an answer to judge, and both are compared."""
TIMEOUT_S = 1800.0


def try_out(run: Run, oracle: ActorHandle, prompts: Sequence[Prompt]) -> None:
    """Ask one question of each kind that the run will ask, about prompts of the pool. Costs one or two queries.

    At every start: the ledger answers what was asked before, so that a finished run asks nothing anew. Nothing is asked
    of an oracle that answers from a table.

    Raises:
        JudgeFailed: the oracle fails, or its answers cannot be read.
        StageTimeout: no answer came.
    """
    config = run.config
    if not config.oracle.is_tried_out:
        return
    judgements = [
        Judgement(
            prompt_id=prompt.id,
            response_id=content_id(prompt.id, RESPONSES[0]),
            prompt=prompt.text,
            response=RESPONSES[0],
        )
        for prompt in prompts
    ]
    if judgements and config.asks_for_judgements:
        _try(oracle, "test question", judgements)
    if judgements and config.asks_to_compare:
        first, second = RESPONSES
        comparisons = [
            Comparison(
                prompt_id=prompt.id,
                first_id=content_id(prompt.id, first),
                second_id=content_id(prompt.id, second),
                prompt=prompt.text,
                first=first,
                second=second,
            )
            for prompt in prompts
        ]
        _try(oracle, "test comparison", comparisons)


def _try(oracle: ActorHandle, what: str, questions: Sequence[Judgement] | Sequence[Comparison]) -> None:
    asked: Any = oracle.try_out.remote(questions)
    try:
        logger.info("%s: %s", what, ray.get(asked, timeout=TIMEOUT_S))
    except RayTaskError as error:
        if isinstance(error.cause, JudgeFailed):  # its message is for the user; Ray's is the actor's traceback
            raise error.cause from None
        raise
    except GetTimeoutError:
        raise StageTimeout(
            f"{what}: the oracle must answer within {TIMEOUT_S / 60:.0f} min, and has not; see its log, lower "
            "oracle.timeout_s or oracle.max_retries, and run the same command again"
        ) from None
