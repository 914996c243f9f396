"""Scalar evaluator: regression on the oracle's scores.

With Bradley-Terry on pairs as its loss, an evaluator is trained as a reward model is (`rayrl.training.reward_model`).
"""

import time
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.config import EvaluatorConfig
from rayrl.data.collate import TokenBatch, sequence_batch
from rayrl.metrics import meters
from rayrl.models.packing import is_packed
from rayrl.models.reward_model import Pooling
from rayrl.models.scalar_head import Float32Linear
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.evaluation import Evaluation
from rayrl.training.job import EvaluatedJob
from rayrl.training.reward_model import new_reward_model
from rayrl.training.steps import num_steps, rank_zero_log, row_names, steps
from rayrl.training.sync.export import export_reward_model

MicroBatch = tuple[TokenBatch, Tensor]
"""Sequences, and the score of each."""


class ScoredRow(TypedDict):
    """One judgement."""

    response_id: str
    token_ids: list[int]
    """Prompt and response."""
    score: float


@dataclass(frozen=True, kw_only=True)
class ScalarJob(EvaluatedJob):
    """Rows are `ScoredRow`s."""

    start: Checkpoint
    """M1: the backbone starts there."""
    evaluator: EvaluatorConfig
    pooling: Pooling
    mean_score: float
    """The head's bias starts here."""


def train_scalar(job: ScalarJob, data: launch.Rows[ScoredRow]) -> None:
    """Train an evaluator on this worker's judgements, and export it."""
    training = job.evaluator
    torch.manual_seed(job.seed)
    with zero.sharded_loading(training, job.torch_dtype):
        evaluator = new_reward_model(
            job.start,
            job.pooling,
            job.torch_dtype,
            lora=training.lora,
            trust_remote_code=job.policy.trust_remote_code,
        )
        # The first steps then learn differences between responses, and not the level of the scale.
        assert isinstance(evaluator.head, Float32Linear), "evaluators have no bottleneck"
        torch.nn.init.constant_(evaluator.head.bias, job.mean_score)
        schedule_steps = num_steps(job.num_rows, training, training.batch_size)
        engine = zero.start(evaluator, training, job.torch_dtype, schedule_steps)
    packed = is_packed(evaluator.backbone)
    engine.train()
    # For a rank without rows while other ranks still work.
    idle = sequence_batch([[0]]).to(engine.device), torch.zeros(1, device=engine.device)

    def summed_loss(micro_batch: MicroBatch) -> Tensor:
        tokens, scores = micro_batch
        predicted = engine(tokens)  # (B,)
        return (predicted - scores).square().sum()

    def on_device(rows: list[ScoredRow]) -> list[MicroBatch]:
        return [
            (tokens.to(engine.device), scores.to(engine.device))
            for tokens, scores in collated(rows, training.micro_batch_tokens, packed)
        ]

    evaluation = Evaluation(
        job=job,
        training=training,
        num_steps=schedule_steps,
        tables=job.held_out_tables,
        engine=engine,
        collated=on_device,
        summed_loss=summed_loss,
        weight=lambda micro_batch: len(micro_batch[1]),
        idle=idle,
        export=lambda: export_reward_model(engine, evaluator, job.policy, job.checkpoint_url),
    )
    with rank_zero_log(job.run_url, job.stage) as log:
        for step in steps(engine, training, job.seed, data, evaluation.stopping):
            started = time.monotonic()
            batches = on_device(step.rows)
            taken = zero.train_step(engine, batches, summed_loss, len(step.rows), idle, row_names(step.rows))
            meters.TRAINING_TOKENS.add(sum(tokens.num_tokens for tokens, _ in batches), stage=job.stage)
            log(
                step.number,
                **taken._asdict(),
                learning_rate=engine.get_lr()[0],
                seconds=time.monotonic() - started,
                waited_s=step.waited_s,
                **evaluation.after(step.number),
            )
    evaluation.finish()


def collated(rows: list[ScoredRow], max_tokens: int, packed: bool) -> list[MicroBatch]:
    """Collate rows in micro-batches, each of at most `max_tokens` with its padding, if there is any."""
    lengths = [[len(row["token_ids"])] for row in rows]
    batches: list[MicroBatch] = []
    for indices in micro_batches(lengths, max_tokens, is_packed=packed):
        tokens = sequence_batch([rows[i]["token_ids"] for i in indices])
        scores = torch.tensor([rows[i]["score"] for i in indices], dtype=torch.float32)
        batches.append((tokens, scores))
    return batches
