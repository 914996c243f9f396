"""Reward as a stage receives it: named, and not served before there is work for it."""

from typing import Protocol

from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint


class Reward(Protocol):
    """A function of responses that a stage can start when it has work, and not before."""

    @property
    def key(self) -> str:
        """Name of the reward's work, so that a stage on another reward is other work."""
        ...

    @property
    def value_start(self) -> Checkpoint | None:
        """Model whose backbone PPO's value function starts from; None is M1."""
        ...

    def serve(self, services: Services) -> ServedReward:
        """Start the engines that the reward needs, if they are not up, and return it ready to be called."""
        ...
