"""The reward model: Bradley-Terry on pairs (arXiv 2203.02155, Eq. 1), weighted (arXiv 2507.15507) or regularised.

The regulariser is unsupervised multi-view learning (RLP, arXiv 2403.19279): L = L_BT + lambda L_M, where L_M reads the
reward model's last layer on two responses to each of some prompts that nobody has judged.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.algorithms.preference import bradley_terry_loss
from rayrl.config import PolicyConfig, TrainingConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch, collate
from rayrl.data.tokenizing import load_tokenizer
from rayrl.metrics import meters
from rayrl.models.multiview import MultiViewRewardModel
from rayrl.models.policy import add_lora, load_policy
from rayrl.models.reward import RewardModel
from rayrl.runs.storage import local_folder
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.steps import names_of, num_steps, rank_zero_log, steps
from rayrl.training.sync import export
from rayrl.training.views import ViewBatch, Views, view_batches


@dataclass(frozen=True, kw_only=True)
class RewardModelJob:
    """Rows have `chosen_token_ids` and `rejected_token_ids`, prompt included, their ids, and perhaps a `weight`."""

    stage: str
    run_url: str
    checkpoint_url: str
    policy: PolicyConfig
    """`path` is M1: the backbone starts there."""
    training: TrainingConfig
    pooling: Literal["mean", "last"]
    dtype: str
    seed: int
    num_rows: int
    random_head: bool = False
    """Start the head at N(0, 1 / (hidden size + 1)), drawn by the seed, not at zero: the members of an ensemble differ
    from the first step on."""
    views: Views | None = None
    """The prompts of unsupervised multi-view learning; None is Bradley-Terry alone."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs: `tokens` holds the B chosen sequences first, then the B rejected ones."""

    tokens: TokenBatch
    weights: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(self.tokens.to(device), self.weights.to(device))


def train_reward_model(job: RewardModelJob, data: launch.Rows) -> None:
    """The worker's loop. A pair's loss is multiplied by its weight; the mean is over pairs, not over weights."""
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    sharding = zero.prepare_zero3(job.training, dtype)
    reward_model = new_reward_model(job.policy, job.training, job.pooling, dtype)
    if job.random_head:
        torch.nn.init.normal_(reward_model.head.weight, std=(reward_model.head.in_features + 1) ** -0.5)
    model = MultiViewRewardModel(reward_model, job.views.uml if job.views else None)
    engine = zero.start(model, job.training, dtype, num_steps(job.num_rows, job.training))
    del sharding
    engine.train()
    idle = pair_batch([IDLE_PAIR]).to(engine.device)
    losses = _Losses(engine, idle)
    views = None
    with rank_zero_log(job.run_url, job.stage) as log:
        for step, rows, waited_s in steps(engine, job.training, job.seed, data):
            started = time.monotonic()
            batches: list[PairBatch | ViewBatch] = [*collated(rows, job.training.micro_batch_tokens)]
            if job.views:
                # First, on every rank: ZeRO-3 gathers the weights of one forward pass on all of them together.
                views = views or view_batches(job.views, job.seed, launch.rank(), launch.world_size(), skip=step - 1)
                share = zero.total(len(rows), engine) / engine.world_size
                batches.insert(0, next(views).weighted(share))
            moved = [batch.to(engine.device) for batch in batches]
            loss = zero.train_step(engine, moved, losses.of, len(rows), idle, names_of(rows))
            meters.TRAINING_TOKENS.add(sum(batch.tokens.num_tokens for batch in batches), stage=job.stage)
            log(
                step,
                loss=loss,
                **losses.watched(),
                learning_rate=engine.get_lr()[0],
                seconds=time.monotonic() - started,
                waited_s=waited_s,
            )
    export.export_reward_model(engine, reward_model, load_tokenizer(job.policy), job.checkpoint_url)


class _Losses:
    """The loss of a micro-batch of either kind, and what a step's micro-batches showed on this rank."""

    def __init__(self, engine: Any, idle: PairBatch):
        self.engine = engine
        self.idle = idle
        self._margins: list[Tensor] = []
        self._pair_losses: list[Tensor] = []
        self._views: dict[str, Tensor] = {}

    def of(self, batch: PairBatch | ViewBatch) -> Tensor:
        tokens = batch.tokens
        if isinstance(batch, ViewBatch):
            loss, mi, skl = self.engine(
                tokens.input_ids, tokens.attention_mask, tokens.position_ids, view_seed=batch.seed
            )
            self._views = {"mi": mi, "skl": skl}
            return batch.weight * loss
        rewards = self.engine(tokens.input_ids, tokens.attention_mask, tokens.position_ids)
        chosen, rejected = rewards.chunk(2)
        losses = batch.weights * bradley_terry_loss(chosen, rejected)
        if batch is not self.idle:
            self._margins.append((chosen - rejected).detach())
            self._pair_losses.append(losses.detach())
        return losses.sum()

    def watched(self) -> dict[str, Tensor]:
        """Share of the step's pairs in the right order, their mean margin and loss; information and divergence."""
        if not self._margins:
            return self._views
        margins, losses = torch.cat(self._margins), torch.cat(self._pair_losses)
        self._margins, self._pair_losses = [], []
        right = (margins > 0).float().mean() + (margins == 0).float().mean() / 2
        return {"accuracy": right, "margin": margins.mean(), "pair_loss": losses.mean(), **self._views}


def new_reward_model(
    policy: PolicyConfig, training: TrainingConfig, pooling: Literal["mean", "last"], dtype: torch.dtype
) -> RewardModel:
    """A policy's backbone, perhaps with adapters, under a head that says nothing yet."""
    backbone = load_policy(local_folder(policy.path), dtype, trust_remote_code=policy.trust_remote_code)
    return RewardModel(add_lora(backbone, training.lora) if training.lora else backbone, pooling)


def collated(rows: list[Row], max_tokens: int) -> list[PairBatch]:
    """Micro-batches of pairs of similar length, each at most `max_tokens` with its padding."""
    lengths = [2 * max(len(row["chosen_token_ids"]), len(row["rejected_token_ids"])) for row in rows]
    return [pair_batch([rows[i] for i in batch]) for batch in micro_batches(lengths, max_tokens)]


def pair_batch(rows: list[Row]) -> PairBatch:
    """One micro-batch of pairs."""
    sequences = [row[side] for side in ("chosen_token_ids", "rejected_token_ids") for row in rows]
    weights = torch.tensor([row.get("weight", 1.0) for row in rows], dtype=torch.float32)
    return PairBatch(sequence_batch(sequences), weights)


def sequence_batch(sequences: list[list[int]]) -> TokenBatch:
    """Whole sequences, ending in the same column."""
    return collate([s[:-1] for s in sequences], [s[-1:] for s in sequences])


IDLE_PAIR: Row = {"chosen_token_ids": [0], "rejected_token_ids": [0], "weight": 0.0}
