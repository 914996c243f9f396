"""What a reward is to those who use one: a function of scored responses, whoever computes it."""

from typing import Protocol

from rayrl.records import Scored


class Rewards(Protocol):
    """Whoever says what a response is worth: reward models, an evaluator, or a Python function."""

    def score(self, items: list[Scored]) -> list[float | None]:
        """One reward per response; None abstains, and the response takes no part."""
        ...
