"""Supervised fine-tuning: -log p(response | prompt), loss on the response only.

Trains M1 from the seed data, and the generative evaluator from the expert's written judgements.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.config import PolicyConfig, SftConfig, TrainingConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch, collate
from rayrl.data.tokenizing import load_tokenizer
from rayrl.metrics import meters
from rayrl.models.policy import add_lora, load_policy, response_logprobs
from rayrl.runs.storage import local_folder
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.steps import names_of, num_steps, rank_zero_log, steps
from rayrl.training.sync import export


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """Rows have `prompt_token_ids` and `response_token_ids`, and an id for messages."""

    stage: str
    run_url: str
    checkpoint_url: str
    policy: PolicyConfig
    """`path` is the model to start from."""
    training: SftConfig | TrainingConfig
    dtype: str
    seed: int
    num_rows: int


def train_sft(job: SftJob, data: launch.Rows) -> None:
    """The worker's loop."""
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    sharding = zero.prepare_zero3(job.training, dtype)
    policy = load_policy(local_folder(job.policy.path), dtype, trust_remote_code=job.policy.trust_remote_code)
    if job.training.lora:
        policy = add_lora(policy, job.training.lora)
    engine = zero.start(policy, job.training, dtype, num_steps(job.num_rows, job.training))
    del sharding
    engine.train()
    idle = collate([[0]], [[0]]).to(engine.device)

    def loss_of(batch: TokenBatch) -> Tensor:
        return -response_logprobs(engine, batch).sum()

    with rank_zero_log(job.run_url, job.stage) as log:
        for step, rows, waited_s in steps(engine, job.training, job.seed, data):
            started = time.monotonic()
            batches = [batch.to(engine.device) for batch in collated(rows, job.training.micro_batch_tokens)]
            num_tokens = sum(int(batch.response_mask.sum()) for batch in batches)
            loss = zero.train_step(engine, batches, loss_of, num_tokens, idle, names_of(rows))
            meters.TRAINING_TOKENS.add(sum(batch.num_tokens for batch in batches), stage=job.stage)
            log(
                step,
                loss=loss,
                learning_rate=engine.get_lr()[0],
                num_tokens=num_tokens,
                seconds=time.monotonic() - started,
                waited_s=waited_s,
            )
    export.export_policy(engine, policy, load_tokenizer(job.policy), job.checkpoint_url)


def collated(rows: list[Row], max_tokens: int) -> list[TokenBatch]:
    """Micro-batches of similar length, each at most `max_tokens` with its padding."""
    lengths = [len(row["prompt_token_ids"]) + len(row["response_token_ids"]) for row in rows]
    return [
        collate([rows[i]["prompt_token_ids"] for i in batch], [rows[i]["response_token_ids"] for i in batch])
        for batch in micro_batches(lengths, max_tokens)
    ]
