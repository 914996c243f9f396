"""The kinds of evaluator, by `evaluator.type`."""

from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.rewards.evaluator import Evaluator, GenerativeEvaluator, ScalarEvaluator
from rayrl.stages.rewards.head_evaluator import HeadEvaluator

EVALUATORS: dict[str, type[Evaluator]] = {
    "generative": GenerativeEvaluator,
    "scalar": ScalarEvaluator,
    "head": HeadEvaluator,
}
"""Kinds of evaluator by `evaluator.type`."""


def evaluator_of(run: Run, checkpoint: Checkpoint, m1: Checkpoint, *, kind: str | None = None) -> Evaluator:
    """Return the evaluator with these weights, of the run's kind (None) or of another one in `EVALUATORS`."""
    config = run.config
    return EVALUATORS[kind or config.evaluator.type](
        run=run,
        checkpoint=checkpoint,
        m1=m1,
        settings=config.evaluator,
        policy=config.policy,
        rubric=load_rubric(config.rubric),
        pooling=config.select.pooling,
        seed=run.seed,
    )
