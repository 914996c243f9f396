"""The scalar evaluator: regression on the expert's scores, or Bradley-Terry on pairs of them."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.algorithms.preference import bradley_terry_loss
from rayrl.config import EvaluatorConfig, PolicyConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch, collate
from rayrl.data.tokenizing import load_tokenizer
from rayrl.models.policy import add_lora, load_policy
from rayrl.models.reward import RewardModel
from rayrl.runs.storage import local_folder
from rayrl.training import engine as zero
from rayrl.training import export, launch
from rayrl.training.steps import num_steps, rank_zero_log, steps

MicroBatch = tuple[TokenBatch, Tensor]


@dataclass(frozen=True, kw_only=True)
class ScalarJob:
    """Regression rows have `token_ids` and `score`; Bradley-Terry rows `chosen_token_ids` and `rejected_token_ids`."""

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
    """The head's bias starts here (regression)."""


def train_scalar(job: ScalarJob, data: launch.Rows) -> None:
    """The worker's loop."""
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    sharding = zero.prepare_zero3(job.evaluator, dtype)
    backbone = load_policy(local_folder(job.policy.path), dtype, trust_remote_code=job.policy.trust_remote_code)
    if job.evaluator.lora:
        backbone = add_lora(backbone, job.evaluator.lora)
    reward_model = RewardModel(backbone, job.pooling)
    if job.evaluator.loss == "regression":
        torch.nn.init.constant_(reward_model.head.bias, job.mean_score)
    engine = zero.start(reward_model, job.evaluator, dtype, num_steps(job.num_rows, job.evaluator))
    del sharding
    engine.train()
    idle = (collate([[0]], [[0]]).to(engine.device), torch.zeros(1, device=engine.device))
    if job.evaluator.loss == "bradley_terry":
        idle = (collate([[0], [0]], [[0], [0]]).to(engine.device), torch.zeros(2, device=engine.device))

    def loss_of(micro: MicroBatch) -> Tensor:
        batch, scores = micro
        rewards = engine(batch.input_ids, batch.attention_mask, batch.position_ids)
        if job.evaluator.loss == "bradley_terry":
            chosen, rejected = rewards.chunk(2)
            return bradley_terry_loss(chosen, rejected).sum()
        return (rewards - scores).square().sum()

    with rank_zero_log(job.run_url, job.stage) as log:
        for step, rows, waited_s in steps(engine, job.evaluator, job.seed, data):
            started = time.monotonic()
            micro = [
                (batch.to(engine.device), scores.to(engine.device)) for batch, scores in collated(rows, job.evaluator)
            ]
            loss = zero.train_step(engine, micro, loss_of, len(rows), idle)
            log(
                step,
                loss=loss,
                learning_rate=engine.get_lr()[0],
                seconds=time.monotonic() - started,
                waited_s=waited_s,
            )
    export.export_reward_model(engine, reward_model, load_tokenizer(job.policy), job.checkpoint_url)


def collated(rows: list[Row], evaluator: EvaluatorConfig) -> list[MicroBatch]:
    """Micro-batches; a Bradley-Terry one holds its chosen sequences first, then its rejected ones."""
    if evaluator.loss == "bradley_terry":
        lengths = [2 * max(len(r["chosen_token_ids"]), len(r["rejected_token_ids"])) for r in rows]
        sides = ("chosen_token_ids", "rejected_token_ids")
    else:
        lengths = [len(r["token_ids"]) for r in rows]
        sides = ("token_ids",)
    collated_batches = []
    for batch in micro_batches(lengths, evaluator.micro_batch_tokens):
        sequences = [rows[i][side] for side in sides for i in batch]
        scores = torch.tensor([rows[i].get("score", 0.0) for _ in sides for i in batch], dtype=torch.float32)
        collated_batches.append((collate([s[:-1] for s in sequences], [s[-1:] for s in sequences]), scores))
    return collated_batches
