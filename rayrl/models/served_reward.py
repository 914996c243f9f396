"""Reward as its callers see it: a function of responses, whatever computes it.

Reward models on their fleet, an evaluator on its fleet, and a user's Python function all have this form.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from rayrl.records import Scored

AbstentionReason = Literal["too_long", "timed_out"]
"""Reasons of an abstention that are counted apart: what the model must read exceeds its context, or a function gave no
answer in time. In any other case the reward itself could not tell."""
Reasons = dict[int, AbstentionReason]
"""By the item's number in the call."""


class ServedReward(Protocol):
    """A reward that is ready to be called."""

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Return one reward per response. None is an abstention: the response is left out of training and metrics.

        Args:
            items: the responses.
            reasons: filled with the reasons of abstentions.
        """
        ...


def score_fitting(
    num_tokens: Sequence[int],
    max_tokens: int,
    score: Callable[[list[int]], Sequence[float | None]],
    reasons: Reasons | None,
) -> list[float | None]:
    """Score what fits a model's context; what does not is an abstention, never a score of a part of it.

    Args:
        num_tokens: tokens that the model must read for each item.
        max_tokens: the most that fit.
        score: returns the scores of the items with these numbers; not called without any.
        reasons: filled with the numbers of the items that do not fit.
    """
    fitting = [number for number, num in enumerate(num_tokens) if num <= max_tokens]
    scores: list[float | None] = [None] * len(num_tokens)
    if fitting:
        for number, value in zip(fitting, score(fitting), strict=True):
            scores[number] = value
    if reasons is not None:
        reasons |= {number: "too_long" for number, num in enumerate(num_tokens) if num > max_tokens}
    return scores
