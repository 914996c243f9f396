"""A Python function of the user's as the reward of PPO."""

from dataclasses import dataclass

from rayrl.fleets.services import Services
from rayrl.oracles.scripted import load_function, source_of
from rayrl.records import Scored, content_id

SETTING = "ppo.function"


@dataclass(frozen=True)
class FunctionReward:
    """A function of (prompt, response) that returns a number; None abstains."""

    path: str
    """"module:function"."""

    @property
    def key(self) -> str:
        """Content of the function's module: an edited function is another reward."""
        return content_id(self.path, source_of(self.path, SETTING))

    @property
    def value_start(self) -> None:
        """The value function starts from M1."""
        return None

    def serve(self, services: Services) -> "FunctionReward":
        """Return itself: it needs no engine."""
        del services
        return self

    def score(self, items: list[Scored]) -> list[float | None]:
        """Call the function on each response."""
        function = load_function(self.path, SETTING)
        values = [function(item.prompt, item.response) for item in items]
        return [None if value is None else float(value) for value in values]
