"""Supervised fine-tuning: -log p(response | prompt), loss on the response only.

Trains M1 on the seed data, and the generative evaluator on the oracle's written judgements.
"""

import time
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.config import EvaluatedTrainingConfig
from rayrl.data.collate import TokenBatch, collate
from rayrl.metrics import meters
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.evaluation import Evaluation
from rayrl.training.job import EvaluatedJob
from rayrl.training.steps import num_steps, rank_zero_log, row_names, steps
from rayrl.training.sync.export import export_policy


class SftRow(TypedDict):
    """One example."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    prompt_id: NotRequired[str]
    """For messages; or the response's."""
    response_id: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class SftJob(EvaluatedJob):
    """Rows are `SftRow`s."""

    start: Checkpoint
    """Weights to start from."""
    training: EvaluatedTrainingConfig


def train_sft(job: SftJob, data: launch.Rows[SftRow]) -> None:
    """Train a policy on this worker's rows, and export it."""
    training = job.training
    torch.manual_seed(job.seed)
    with zero.sharded_loading(training, job.torch_dtype):
        policy = load_policy(job.start, job.torch_dtype, trust_remote_code=job.policy.trust_remote_code)
        if training.lora:
            policy = add_lora(policy, training.lora, job.start)
        schedule_steps = num_steps(job.num_rows, training, training.batch_size)
        engine = zero.start(TokenLogprobs(policy), training, job.torch_dtype, schedule_steps)
    packed = is_packed(policy)
    engine.train()
    idle = collate([[0]], [[0]]).to(engine.device)  # for a rank without rows while other ranks still work

    def summed_loss(batch: TokenBatch) -> Tensor:
        return -engine(batch).sum()

    def on_device(rows: list[SftRow]) -> list[TokenBatch]:
        return [batch.to(engine.device) for batch in collated(rows, training.micro_batch_tokens, packed)]

    evaluation = Evaluation(
        job=job,
        training=training,
        num_steps=schedule_steps,
        tables=job.held_out_tables,
        engine=engine,
        collated=on_device,
        summed_loss=summed_loss,
        weight=lambda batch: int(batch.response_mask.sum()),
        idle=idle,
        export=lambda: export_policy(engine, policy, job.policy, job.checkpoint_url),
    )
    with rank_zero_log(job.run_url, job.stage) as log:
        for step in steps(engine, training, job.seed, data, evaluation.stopping):
            started = time.monotonic()
            batches = on_device(step.rows)
            # The mean is over response tokens, not over examples: long responses count for more.
            num_response_tokens = sum(int(batch.response_mask.sum()) for batch in batches)
            names = row_names(step.rows)
            taken = zero.train_step(engine, batches, summed_loss, num_response_tokens, idle, names)
            meters.TRAINING_TOKENS.add(sum(batch.num_tokens for batch in batches), stage=job.stage)
            log(
                step.number,
                **taken._asdict(),
                learning_rate=engine.get_lr()[0],
                num_tokens=zero.sum_over_ranks(num_response_tokens, engine),
                seconds=time.monotonic() - started,
                waited_s=step.waited_s,
                **evaluation.after(step.number),
            )
    evaluation.finish()


def collated(rows: list[SftRow], max_tokens: int, packed: bool) -> list[TokenBatch]:
    """Collate rows in micro-batches, each of at most `max_tokens` with its padding, if there is any."""
    lengths = [[len(row["prompt_token_ids"]) + len(row["response_token_ids"])] for row in rows]
    batches: list[TokenBatch] = []
    for indices in micro_batches(lengths, max_tokens, is_packed=packed):
        prompts = [rows[i]["prompt_token_ids"] for i in indices]
        responses = [rows[i]["response_token_ids"] for i in indices]
        batches.append(collate(prompts, responses))
    return batches
