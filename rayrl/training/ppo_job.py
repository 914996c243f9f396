"""Job of a PPO training: its models, its fleet, and the folders that it writes."""

from dataclasses import dataclass

from rayrl.config import PpoConfig
from rayrl.engines.generator import Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint
from rayrl.training.job import TrainingJob
from rayrl.training.rollout import PromptRow
from rayrl.training.sync.transfer import Transport


@dataclass(frozen=True, kw_only=True)
class PpoJob(TrainingJob):
    """Rows are `PromptRow`s."""

    best_url: str
    """Folder for the policy of the highest held-out reward."""
    held_out_url: str
    """Folder for the responses to the held-out prompts, by step."""
    sync_url: str
    """Folder through which weights reach the replicas, or those that restart: shared memory on one machine."""
    transport: Transport | None = None
    """Brings weights to the replicas without a folder."""
    m1: Checkpoint
    """Weights to start from, and the reference."""
    value_start: Checkpoint
    """Backbone that the value function, if one is trained, starts from: the reward model's, or M1's."""
    ppo: PpoConfig
    sampling: Sampling
    fleet: Fleet
    rewards: ServedReward
    held_out: list[PromptRow]
    """Prompts on which the reward is measured along the way."""
