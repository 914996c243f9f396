"""Direct preference optimisation (arXiv 2305.18290) of M1 on the pseudo-labelled pairs."""

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.algorithms.preference import dpo_loss
from rayrl.config import DpoConfig, PolicyConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch, collate
from rayrl.data.tokenizing import load_tokenizer
from rayrl.metrics import meters
from rayrl.models.policy import add_lora, load_policy, response_logprobs
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.steps import names_of, num_steps, rank_zero_log, steps
from rayrl.training.sync import export


@dataclass(frozen=True, kw_only=True)
class DpoJob:
    """Rows are `PreferencePair`s."""

    run_url: str
    checkpoint_url: str
    policy: PolicyConfig
    """`path` is M1: the start and the reference."""
    dpo: DpoConfig
    reference: str
    """"generation": the rows' own reference log-probabilities; "pass": one pass of M1 before the first step."""
    dtype: str
    seed: int
    num_rows: int
    """Pairs expected; sets the length of the learning-rate schedule."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs: `tokens` holds the B chosen responses first, then the B rejected ones."""

    names: list[str]
    tokens: TokenBatch
    reference_chosen: Tensor
    reference_rejected: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(
            self.names, self.tokens.to(device), self.reference_chosen.to(device), self.reference_rejected.to(device)
        )


def train_dpo(job: DpoJob, data: launch.Rows) -> None:
    """The worker's loop."""
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    sharding = zero.prepare_zero3(job.dpo, dtype)
    policy = load_policy(storage.local_folder(job.policy.path), dtype, trust_remote_code=job.policy.trust_remote_code)
    if job.dpo.lora:
        policy = add_lora(policy, job.dpo.lora)
    engine = zero.start(policy, job.dpo, dtype, num_steps(job.num_rows, job.dpo))
    del sharding
    references = reference_pass(engine, job, data) if job.reference == "pass" else {}
    engine.train()
    idle = pair_batch([IDLE_PAIR]).to(engine.device)
    rewards: list[Tensor] = []

    def loss_of(batch: PairBatch) -> Tensor:
        losses, chosen_rewards, rejected_rewards = pair_losses(engine, batch, job.dpo)
        rewards.append((chosen_rewards - rejected_rewards).detach())
        return losses.sum()

    with rank_zero_log(job.run_url, "dpo") as log:
        for step, rows, waited_s in steps(engine, job.dpo, job.seed, data):
            started = time.monotonic()
            rows = [row | references.get(name_of(row), {}) for row in rows]
            batches = [batch.to(engine.device) for batch in collated(rows, job.dpo.micro_batch_tokens)]
            rewards.clear()
            loss = zero.train_step(engine, batches, loss_of, len(rows), idle, names_of(rows))
            num_tokens = sum(batch.tokens.num_tokens for batch in batches)
            meters.TRAINING_TOKENS.add(num_tokens, stage="dpo")
            if rewards:
                margins = torch.cat(rewards)
                padded = sum(batch.tokens.attention_mask.numel() for batch in batches)
                log(
                    step,
                    loss=loss,
                    reward_margin=margins.mean(),
                    reward_accuracy=(margins > 0).float().mean(),
                    learning_rate=engine.get_lr()[0],
                    num_tokens=num_tokens,
                    padding_share=1 - num_tokens / max(1, padded),
                    seconds=time.monotonic() - started,
                    waited_s=waited_s,
                )
    export.export_policy(engine, policy, load_tokenizer(job.policy), job.checkpoint_url)


def pair_losses(model: torch.nn.Module, batch: PairBatch, dpo: DpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Per-pair losses and the implicit rewards of both sides, (B,) each."""
    chosen, rejected = response_logprobs(model, batch.tokens).chunk(2)
    chosen_length, rejected_length = batch.tokens.response_mask.sum(1).chunk(2)
    normalised = dpo.length_normalised or dpo.loss == "ipo"
    return dpo_loss(
        chosen - batch.reference_chosen,
        rejected - batch.reference_rejected,
        beta=dpo.beta,
        loss=dpo.loss,
        label_smoothing=dpo.label_smoothing,
        lengths=(chosen_length, rejected_length) if normalised else None,
    )


def collated(rows: list[Row], max_tokens: int) -> list[PairBatch]:
    """Micro-batches of pairs of similar length, each at most `max_tokens` with its padding."""
    lengths = [
        2 * (len(r["prompt_token_ids"]) + max(len(r["chosen_token_ids"]), len(r["rejected_token_ids"]))) for r in rows
    ]
    return [pair_batch([rows[i] for i in batch]) for batch in micro_batches(lengths, max_tokens)]


def pair_batch(rows: list[Row]) -> PairBatch:
    """One micro-batch of pairs."""
    prompts = [r["prompt_token_ids"] for r in rows]
    responses = [r["chosen_token_ids"] for r in rows] + [r["rejected_token_ids"] for r in rows]
    return PairBatch(
        [name_of(r) for r in rows],
        collate(prompts + prompts, responses),
        torch.tensor([r["chosen_reference_logprob"] for r in rows], dtype=torch.float32),
        torch.tensor([r["rejected_reference_logprob"] for r in rows], dtype=torch.float32),
    )


IDLE_PAIR: Row = {
    "chosen_id": "idle",
    "rejected_id": "idle",
    "prompt_token_ids": [0],
    "chosen_token_ids": [0],
    "rejected_token_ids": [0],
    "chosen_reference_logprob": 0.0,
    "rejected_reference_logprob": 0.0,
}


def reference_pass(engine: Any, job: DpoJob, data: launch.Rows) -> dict[str, dict[str, float]]:
    """M1's log-probabilities of every pair, read once before the first step and kept beside the fit.

    A restarted worker reads them back: by then the policy has moved.
    """
    url = storage.join(job.run_url, "stages", "dpo", f"references-{launch.rank()}-of-{launch.world_size()}.json")
    if storage.exists(url):
        return storage.read_json(url)
    engine.eval()
    references: dict[str, dict[str, float]] = {}
    rows = data()
    while zero.largest(len(chunk := list(islice(rows, job.dpo.batch_size))), engine) > 0:
        batches = collated(chunk, job.dpo.micro_batch_tokens)
        for i in range(int(zero.largest(len(batches), engine))):
            batch = (batches[i] if i < len(batches) else pair_batch([IDLE_PAIR])).to(engine.device)
            with torch.no_grad():
                chosen, rejected = response_logprobs(engine, batch.tokens).chunk(2)
            for name, c, r in zip(batch.names, chosen.tolist(), rejected.tolist(), strict=True):
                references[name] = {"chosen_reference_logprob": c, "rejected_reference_logprob": r}
    storage.write_json(url, references)
    return references


def name_of(pair: Row) -> str:
    """What a pair's reference log-probabilities are kept under."""
    return f"{pair['chosen_id']}/{pair['rejected_id']}"
