"""The scalar evaluator: regression on the expert's scores. Bradley-Terry on pairs is the reward model's training."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.config import EvaluatorConfig, PolicyConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch
from rayrl.data.tokenizing import load_tokenizer
from rayrl.metrics import meters
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.reward_model import new_reward_model, sequence_batch
from rayrl.training.steps import names_of, num_steps, rank_zero_log, steps
from rayrl.training.sync import export

MicroBatch = tuple[TokenBatch, Tensor]


@dataclass(frozen=True, kw_only=True)
class ScalarJob:
    """Rows have `token_ids`, prompt included, `score` and `response_id`."""

    stage: str
    run_url: str
    checkpoint_url: str
    policy: PolicyConfig
    """`path` is M1: the backbone starts there."""
    evaluator: EvaluatorConfig
    pooling: Literal["mean", "last"]
    dtype: str
    seed: int
    num_rows: int
    mean_score: float
    """The head's bias starts here."""


def train_scalar(job: ScalarJob, data: launch.Rows) -> None:
    """The worker's loop."""
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    sharding = zero.prepare_zero3(job.evaluator, dtype)
    reward_model = new_reward_model(job.policy, job.evaluator, job.pooling, dtype)
    torch.nn.init.constant_(reward_model.head.bias, job.mean_score)
    engine = zero.start(reward_model, job.evaluator, dtype, num_steps(job.num_rows, job.evaluator))
    del sharding
    engine.train()
    idle = (sequence_batch([[0]]).to(engine.device), torch.zeros(1, device=engine.device))

    def loss_of(micro: MicroBatch) -> Tensor:
        batch, scores = micro
        return (engine(batch.input_ids, batch.attention_mask, batch.position_ids) - scores).square().sum()

    with rank_zero_log(job.run_url, job.stage) as log:
        for step, rows, waited_s in steps(engine, job.evaluator, job.seed, data):
            started = time.monotonic()
            micro = [
                (batch.to(engine.device), scores.to(engine.device))
                for batch, scores in collated(rows, job.evaluator.micro_batch_tokens)
            ]
            loss = zero.train_step(engine, micro, loss_of, len(rows), idle, names_of(rows))
            meters.TRAINING_TOKENS.add(sum(batch.num_tokens for batch, _ in micro), stage=job.stage)
            log(
                step,
                loss=loss,
                learning_rate=engine.get_lr()[0],
                seconds=time.monotonic() - started,
                waited_s=waited_s,
            )
    export.export_reward_model(engine, reward_model, load_tokenizer(job.policy), job.checkpoint_url)


def collated(rows: list[Row], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of similar length with their scores, each at most `max_tokens` with its padding."""
    return [
        (
            sequence_batch([rows[i]["token_ids"] for i in batch]),
            torch.tensor([rows[i]["score"] for i in batch], dtype=torch.float32),
        )
        for batch in micro_batches([len(row["token_ids"]) for row in rows], max_tokens)
    ]
