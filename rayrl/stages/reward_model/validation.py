"""What reward models are worth: measured on held-out pairs, through the engines that will serve them."""

from dataclasses import replace
from typing import Any

from rayrl.fleets.services import Services
from rayrl.runs.run import Manifest, Run
from rayrl.stages.reward_model.training_data import TrainingData, sampled_sequences
from rayrl.stages.rewards.reward_models import RewardModels, member_values, pair_items, pair_metrics

NUM_STANDARD = 512
"""Training pairs whose rewards say what a member's mean and standard deviation are."""


def measure(run: Run, services: Services, models: RewardModels, data: TrainingData) -> dict[str, Any]:
    """Each member's standard on training pairs, and what it and all of them together make of the held-out pairs."""
    scorer = models.serve(services)
    sequences = sampled_sequences(data.rows, NUM_STANDARD, run.config.seed)
    standards = [member_values(scorer.fleet, member, sequences) for member in models.checkpoints]
    scorer = replace(
        scorer,
        means=tuple(float(values.mean()) for values in standards),
        stds=tuple(float(values.std()) for values in standards),
    )
    values = scorer.values(pair_items(data.held_out))
    return {
        "num_pairs": data.num_rows,
        "num_left_out": data.num_left_out,
        "means": scorer.means,
        "stds": scorer.stds,
        "members": [pair_metrics(data.held_out, own.tolist()) for own in values],
        "validation": pair_metrics(data.held_out, scorer.combine(values).tolist()),
    }


def finish(run: Run, stage: str, key: str, started: float, metrics: dict[str, Any]) -> Manifest:
    """Write the stage's manifest."""
    validation = metrics["validation"]
    accuracy = validation["accuracy"]
    return run.finish(
        stage,
        key,
        since=started,
        num_rows=metrics["num_pairs"],
        metrics=metrics,
        summary=f"{len(metrics['members'])} model(s), {metrics['num_pairs']} pairs; on {validation['num']} held out: "
        f"accuracy {accuracy['mean']:.2f} +- {accuracy['standard_error']:.2f}, "
        f"calibration error {validation['calibration_error']:.2f}",
    )


def measured(models: RewardModels, done: Manifest) -> RewardModels:
    """The reward models of a finished stage, with their standards."""
    return replace(models, means=tuple(done.metrics["means"]), stds=tuple(done.metrics["stds"]))
