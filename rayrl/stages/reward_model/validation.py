"""Validation of reward models: their accuracy on held-out pairs, measured through the engines that will serve them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayrl.fleets.services import Services
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import FitMetrics, MemberMetrics, RewardModelMetrics
from rayrl.runs.stage_table import Stage
from rayrl.stages.reward_model.training_data import TrainingData, sampled_sequences
from rayrl.stages.rewards.reward_models import RewardModels, member_values, pair_items, validate_pairs

NUM_STANDARD = 512
"""Training pairs on whose rewards a member's mean and standard deviation are measured."""


def measure_reward_models(
    run: Run, services: Services, models: RewardModels, data: TrainingData, fits: Sequence[FitMetrics | None]
) -> RewardModelMetrics:
    """Measure each member's mean and spread on training pairs; then each of them, and all together, on held-out ones.

    Args:
        run: the run.
        services: start the embedding fleet.
        models: the members, without their means and standard deviations.
        data: training rows and held-out pairs.
        fits: how each member was trained; None for a ready-made one.
    """
    scorer = models.serve(services)
    # On training pairs: a mean and a spread need no unseen responses, and the held-out ones are few.
    sequences = sampled_sequences(data.rows, NUM_STANDARD, run.seed)
    means: list[float] = []
    stds: list[float] = []
    for checkpoint in models.checkpoints:
        rewards = member_values(scorer.fleet, checkpoint, sequences)
        means.append(float(rewards.mean()))
        stds.append(float(rewards.std()))
    # Only now can the scorer combine its members.
    scorer = replace(scorer, means=tuple(means), stds=tuple(stds))

    values: np.ndarray = scorer.values(pair_items(data.held_out))  # (members, 2 x pairs)
    members: list[MemberMetrics] = []
    for fit, own_values in zip(fits, values, strict=True):
        members.append(MemberMetrics(fit=fit, validation=validate_pairs(data.held_out, own_values.tolist())))
    return RewardModelMetrics(
        num_pairs=data.num_rows,
        num_left_out=data.num_left_out,
        means=means,
        stds=stds,
        members=members,
        validation=validate_pairs(data.held_out, scorer.combine(values).tolist()),
    )


def finish_reward_model(
    run: Run, stage: Stage[RewardModelMetrics], key: str, started: float, metrics: RewardModelMetrics
) -> Manifest[RewardModelMetrics]:
    """Write the stage's manifest."""
    validation = metrics.validation
    assert validation.accuracy is not None, "reward models never abstain, and a prompt is held out"
    return run.finish(
        stage,
        key,
        since=started,
        num_rows=metrics.num_pairs,
        metrics=metrics,
        summary=f"{len(metrics.members)} model(s), {metrics.num_pairs} pairs; on {validation.num} held out: "
        f"accuracy {validation.accuracy.mean:.2f} +- {validation.accuracy.standard_error:.2f}, "
        f"calibration error {validation.calibration_error:.2f}",
    )


def with_standards(models: RewardModels, metrics: RewardModelMetrics) -> RewardModels:
    """Give the reward models the means and standard deviations that their stage has measured."""
    return replace(models, means=tuple(metrics.means), stds=tuple(metrics.stds))
