"""What a stage is given as a reward; and reward models as one: served, combined, and how often they prefer what
somebody else preferred.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import expit

from rayrl.algorithms.rewards import ensemble_reward
from rayrl.algorithms.statistics import expected_calibration_error, paired_difference, spearman
from rayrl.config import RewardModelConfig, RunConfig
from rayrl.data.tokenizing import context_length
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, PreferencePair, Scored


class Reward(Protocol):
    """Who says what a response is worth, by name. A stage serves it when it has work, and not before."""

    @property
    def key(self) -> str:
        """Names the reward's work, so that a stage on another reward is another stage."""
        ...

    @property
    def value_path(self) -> str | None:
        """The model whose backbone a value function starts from; None: M1's."""
        ...

    def serve(self, services: Services) -> ServedReward:
        """The reward, ready to be asked; starts the engines it needs if they are not up."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardModels:
    """r: one reward model, or the members of an ensemble."""

    key: str
    checkpoints: tuple[Checkpoint, ...]
    m1: Checkpoint
    """What the engines start from if they are not up."""
    config: RunConfig
    means: tuple[float, ...] = ()
    """Each member's mean reward of the responses it learnt from: only differences within a member mean anything."""
    stds: tuple[float, ...] = ()

    @property
    def value_path(self) -> str:
        """The first member."""
        return self.checkpoints[0].path

    def serve(self, services: Services) -> "RewardScorer":
        """On the embedding fleet."""
        return RewardScorer(
            members=self.checkpoints,
            means=self.means,
            stds=self.stds,
            fleet=services.ready(services.embedders(self.m1, "last")),
            config=self.config.reward_model,
            max_tokens=context_length(self.config.policy),
        )


@dataclass(frozen=True, kw_only=True)
class RewardScorer:
    """Reward models and the fleet that serves them; travels to tasks and training workers."""

    members: tuple[Checkpoint, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    fleet: Fleet
    config: RewardModelConfig
    max_tokens: int
    """Longer sequences lose their ends, as they did in training."""

    def score(self, items: list[Scored]) -> list[float | None]:
        """One reward per item: the model's own value, or the ensemble's, in standard deviations of its members."""
        return [float(reward) for reward in self.combine(self.values(items))]

    def values(self, items: Sequence[Scored]) -> np.ndarray:
        """Every member's own value of every item, (members, items) float64.

        All items with one member before the next: a replica holds the weights of one.
        """
        inputs = [item.token_ids[: self.max_tokens] for item in items]
        return np.stack([member_values(self.fleet, member, inputs) for member in self.members])

    def combine(self, values: np.ndarray) -> np.ndarray:
        """(members, items) -> (items,); a single member's values stay as they are."""
        if len(values) == 1:
            return values[0]
        spread = np.array([std or 1.0 for std in self.stds])
        standard = (values - np.array(self.means)[:, None]) / spread[:, None]
        combined = ensemble_reward(
            torch.from_numpy(standard), self.config.objective, variance_coef=self.config.variance_coef
        )
        return combined.numpy()


def member_values(fleet: Fleet, member: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
    """One reward model's values."""
    return np.array(fleet.map(len(inputs), lambda part: fleet.call("values", member, inputs[part])), float)


def pair_items(pairs: Sequence[PreferencePair]) -> list[Scored]:
    """Both responses of every pair, as they are to be scored: all chosen ones, then all rejected ones."""
    chosen = [
        Scored(prompt=p.prompt, response=p.chosen, token_ids=p.prompt_token_ids + p.chosen_token_ids) for p in pairs
    ]
    return chosen + [
        Scored(prompt=p.prompt, response=p.rejected, token_ids=p.prompt_token_ids + p.rejected_token_ids) for p in pairs
    ]


def pair_metrics(pairs: Sequence[PreferencePair], rewards: Sequence[float | None]) -> dict[str, Any]:
    """Accuracy, calibration, margin, and correlation with length, from the rewards of `pair_items(pairs)`.

    `accuracy` is the share of pairs in the right order, a tie half of one; every prompt counts once, whatever the
    number of its pairs, and the standard error is over prompts. `calibration_error` compares the confidence that
    Bradley-Terry reads off a margin, sigma(|r_1 - r_2|), with accuracy; it says nothing of standardised rewards.
    Pairs with a side that has no reward are left out, and counted.
    """
    sides = list(zip(pairs, rewards[: len(pairs)], rewards[len(pairs) :], strict=True))
    known = [
        (pair, chosen, rejected) for pair, chosen, rejected in sides if chosen is not None and rejected is not None
    ]
    counts = {"num": len(known), "num_abstained": len(pairs) - len(known)}
    if not known:
        return counts | dict.fromkeys(("accuracy", "calibration_error", "mean_margin", "length_correlation"))
    chosen, rejected = (np.array([item[side] for item in known], np.float64) for side in (1, 2))
    margins = chosen - rejected
    right = (np.sign(margins) + 1) / 2
    lengths = [len(p.chosen_token_ids) for p, *_ in known] + [len(p.rejected_token_ids) for p, *_ in known]
    correlation = spearman(np.concatenate([chosen, rejected]), np.array(lengths))
    of_prompts = per_prompt([p.prompt_id for p, *_ in known], right)
    return counts | {
        "accuracy": asdict(paired_difference(of_prompts, np.zeros(len(of_prompts)))),
        "calibration_error": expected_calibration_error(expit(np.abs(margins)), right, num_bins=20),
        "mean_margin": float(margins.mean()),
        "length_correlation": asdict(correlation) if correlation else None,
    }


def per_prompt(prompt_ids: Sequence[str], values: np.ndarray) -> np.ndarray:
    """The mean value of each prompt's pairs."""
    _, which = np.unique(prompt_ids, return_inverse=True)
    return np.bincount(which, values) / np.bincount(which)
