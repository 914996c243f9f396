"""What a reward is to those who ask it: a function of responses, whoever computes it."""

from typing import Protocol

from rayrl.records import Scored


class ServedReward(Protocol):
    """Whoever says what a response is worth: reward models, an evaluator, or a Python function."""

    def score(self, items: list[Scored]) -> list[float | None]:
        """One reward per response; None abstains, and the response takes no part."""
        ...
