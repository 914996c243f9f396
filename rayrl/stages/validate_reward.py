"""What reward models are worth: measured on held-out pairs, through the engines that will serve them."""

from dataclasses import replace
from typing import Any

from rayrl.actors.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.stages.reward import RewardModels, make_reward_scorer, member_values, pair_items, pair_metrics
from rayrl.stages.reward_rows import TrainingData, sampled_sequences

NUM_STANDARD = 512
"""Training pairs whose rewards say what a member's mean and standard deviation are."""


def measure(
    run: Run, services: Services, m1: Checkpoint, members: list[Checkpoint], data: TrainingData
) -> dict[str, Any]:
    """Each member's standard on training pairs, and what it and all of them together make of the held-out pairs."""
    scorer = make_reward_scorer(run, services, m1, RewardModels(key="", checkpoints=tuple(members)))
    sequences = sampled_sequences(data.rows, NUM_STANDARD, run.config.seed)
    standards = [member_values(scorer.fleet, member, sequences) for member in members]
    models = replace(
        scorer.models,
        means=tuple(float(values.mean()) for values in standards),
        stds=tuple(float(values.std()) for values in standards),
    )
    scorer = replace(scorer, models=models)
    values = scorer.values(pair_items(data.held_out))
    return {
        "num_pairs": data.num_rows,
        "num_left_out": data.num_left_out,
        "means": models.means,
        "stds": models.stds,
        "members": [pair_metrics(data.held_out, own.tolist()) for own in values],
        "validation": pair_metrics(data.held_out, scorer.combine(values).tolist()),
    }


def finish(run: Run, stage: str, key: str, started: float, measured: dict[str, Any]) -> Manifest:
    """Write the stage's manifest."""
    validation = measured["validation"]
    accuracy = validation["accuracy"]
    return run.finish(
        stage,
        key,
        since=started,
        num_rows=measured["num_pairs"],
        metrics=measured,
        summary=f"{len(measured['members'])} model(s), {measured['num_pairs']} pairs; on {validation['num']} held out: "
        f"accuracy {accuracy['mean']:.2f} +- {accuracy['standard_error']:.2f}, "
        f"calibration error {validation['calibration_error']:.2f}",
    )


def reward_models(key: str, members: list[Checkpoint], done: Manifest) -> RewardModels:
    """The reward models of a finished stage."""
    means, stds = tuple(done.metrics["means"]), tuple(done.metrics["stds"])
    return RewardModels(key=key, checkpoints=tuple(members), means=means, stds=stds)
