"""Reward as its callers see it: a function of responses, whatever computes it.

Reward models on their fleet, an evaluator on its fleet, and a user's Python function all have this form.
"""

from typing import Protocol

from rayrl.records import Scored


class ServedReward(Protocol):
    """A reward that is ready to be called."""

    def score(self, items: list[Scored]) -> list[float | None]:
        """Return one reward per response. None is an abstention: the response is left out of training and metrics."""
        ...
