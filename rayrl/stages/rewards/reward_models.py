"""Reward models as a reward: one model or an ensemble, served by the embedding fleet, its members' values combined.

Only differences within one reward model mean anything. The members of an ensemble are therefore standardised, each by
its own mean and standard deviation, before they are combined (arXiv 2310.02743). A single model's values stay as they
are. How reward models are fitted is in `rayrl.stages.reward_model`; here is also how their order of preference pairs is
measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

from rayrl.algorithms.rewards import ensemble_reward
from rayrl.algorithms.statistics import expected_calibration_error, paired_difference, spearman
from rayrl.config import RewardModelConfig, RunConfig
from rayrl.data.tokenizing import context_length
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.served_reward import Reasons, score_fitting
from rayrl.records import Checkpoint, PreferencePair, Scored
from rayrl.runs.stage_metrics import PairValidation

NUM_BINS = 20
"""Of the calibration error, over confidences from 0 to 1; those of a pair begin at 0.5."""


@dataclass(frozen=True, kw_only=True)
class RewardModels:
    """r: one reward model, or the members of an ensemble. Not served yet."""

    key: str
    checkpoints: tuple[Checkpoint, ...]
    m1: Checkpoint
    """What the engines start from if they are not up."""
    config: RunConfig
    means: tuple[float, ...] = ()
    """Each member's mean reward of the responses it learnt from."""
    stds: tuple[float, ...] = ()
    """Each member's standard deviation on them."""

    @property
    def value_start(self) -> Checkpoint:
        """The first member: its backbone knows the reward already."""
        return self.checkpoints[0]

    def serve(self, services: Services) -> "RewardScorer":
        """Start the embedding fleet if it is not up, and return the reward models on it."""
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
    """Context: on a longer sequence it abstains."""

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Score each item: the model's own value, or the ensemble's, in standard deviations of its members."""

        def rewards(numbers: list[int]) -> list[float]:
            return self.combine(self.values([items[number] for number in numbers])).tolist()

        return score_fitting([len(item.token_ids) for item in items], self.max_tokens, rewards, reasons)

    def values(self, items: Sequence[Scored]) -> np.ndarray:
        """Read every member's own value of every item, (members, items) float64; every item fits the context."""
        inputs = [item.token_ids for item in items]
        # All items with one member before the next: a replica holds the weights of one, and swaps take time.
        return np.stack([member_values(self.fleet, member, inputs) for member in self.members])

    def combine(self, values: np.ndarray) -> np.ndarray:
        """Combine the members' values, (members, items) -> (items,); a single member's stay as they are."""
        if len(values) == 1:
            return values[0]
        means = np.array(self.means)
        stds = np.array([std or 1.0 for std in self.stds])  # a member that always gives one value has a spread of 0
        standard = (values - means[:, None]) / stds[:, None]
        combined = ensemble_reward(
            torch.from_numpy(standard), self.config.objective, variance_coef=self.config.variance_coef
        )
        return combined.numpy()


def member_values(fleet: Fleet, member: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
    """Read one reward model's values of token sequences, (inputs,) float64."""
    return np.array(fleet.map(len(inputs), lambda part: fleet.call("values", member, inputs[part])), float)


def pair_items(pairs: Sequence[PreferencePair]) -> list[Scored]:
    """List both responses of every pair, as they are to be scored: all chosen ones, then all rejected ones."""
    chosen: list[Scored] = []
    rejected: list[Scored] = []
    for pair in pairs:
        prompt = pair.prompt_token_ids
        chosen.append(Scored(prompt=pair.prompt, response=pair.chosen, token_ids=prompt + pair.chosen_token_ids))
        rejected.append(Scored(prompt=pair.prompt, response=pair.rejected, token_ids=prompt + pair.rejected_token_ids))
    return chosen + rejected


def validate_pairs(pairs: Sequence[PreferencePair], rewards: Sequence[float | None]) -> PairValidation:
    """Compute accuracy, calibration, margin, and correlation with length, from the rewards of `pair_items(pairs)`.

    `accuracy` is the share of pairs in the right order, a tie half of one; every prompt counts once, whatever the
    number of its pairs, and the standard error is over prompts. `calibration_error` compares the confidence that
    Bradley-Terry reads off a margin, sigma(|r_1 - r_2|), with accuracy; it means nothing for standardised rewards.
    Pairs with a side that has no reward are left out, and counted.
    """
    known: list[PreferencePair] = []
    known_chosen: list[float] = []
    known_rejected: list[float] = []
    for pair, own_chosen, own_rejected in zip(pairs, rewards[: len(pairs)], rewards[len(pairs) :], strict=True):
        if own_chosen is not None and own_rejected is not None:
            known.append(pair)
            known_chosen.append(own_chosen)
            known_rejected.append(own_rejected)
    num_abstained = len(pairs) - len(known)
    if not known:
        return PairValidation(
            num=0,
            num_abstained=num_abstained,
            accuracy=None,
            calibration_error=None,
            mean_margin=None,
            length_correlation=None,
        )
    chosen, rejected = np.array(known_chosen, np.float64), np.array(known_rejected, np.float64)
    margins = chosen - rejected
    # 1, 0, or 1/2 for a tie
    right = (np.sign(margins) + 1) / 2
    prompt_accuracy = per_prompt([pair.prompt_id for pair in known], right)
    # Over responses, not pairs: a reward that follows length alone is found out whichever side is longer.
    lengths = [len(pair.chosen_token_ids) for pair in known] + [len(pair.rejected_token_ids) for pair in known]
    return PairValidation(
        num=len(known),
        num_abstained=num_abstained,
        accuracy=paired_difference(prompt_accuracy, np.zeros(len(prompt_accuracy))),
        calibration_error=expected_calibration_error(expit(np.abs(margins)), right, num_bins=NUM_BINS),
        mean_margin=float(margins.mean()),
        length_correlation=spearman(np.concatenate([chosen, rejected]), np.array(lengths)),
    )


def per_prompt(prompt_ids: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Average the values of each prompt's pairs, (pairs,) -> (prompts,)."""
    _, prompt_numbers = np.unique(prompt_ids, return_inverse=True)
    return np.bincount(prompt_numbers, values) / np.bincount(prompt_numbers)
