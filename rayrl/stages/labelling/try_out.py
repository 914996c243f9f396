"""Test question: one real question goes the whole way to the oracle before the first GPU second is spent."""

import logging
from collections.abc import Sequence

from ray.actor import ActorHandle

from rayrl.records import Comparison, Judgement, Prompt, content_id
from rayrl.runs.run import Run
from rayrl.stages.labelling.ask import wait_for

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
    logger.info("%s: %s", what, wait_for(oracle.try_out.remote(questions), what, TIMEOUT_S))
