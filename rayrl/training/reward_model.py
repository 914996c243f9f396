"""Reward model: Bradley-Terry on pairs (arXiv 2203.02155, Eq. 1), weighted (arXiv 2507.15507) or regularised.

The regulariser is unsupervised multi-view learning (RLP, arXiv 2403.19279): L = L_BT + lambda L_M, where L_M reads the
reward model's last layer on two responses to each of some prompts that have no label.

With a bottleneck (InfoRM, arXiv 2402.09345) the reward is read off a noisy code of the last layer, and the loss of a
pair also has the divergence of its codes from the prior.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from rayrl.algorithms.batching import micro_batches
from rayrl.algorithms.information import Gaussian, bottleneck_losses, kl_to_standard_normal
from rayrl.algorithms.preference import bradley_terry_loss
from rayrl.config import BottleneckConfig, EvaluatedTrainingConfig, LoraConfig
from rayrl.data.collate import TokenBatch, sequence_batch
from rayrl.metrics import meters
from rayrl.models.multiview import MultiViewRewardModel
from rayrl.models.packing import is_packed
from rayrl.models.policy import add_lora, load_policy
from rayrl.models.reward_model import Pooling, RewardModel
from rayrl.models.scalar_head import Float32Linear
from rayrl.records import Checkpoint, drawn_seed
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.evaluation import Evaluation
from rayrl.training.job import EvaluatedJob
from rayrl.training.steps import num_steps, rank_zero_log, row_names, steps
from rayrl.training.sync.export import export_reward_model
from rayrl.training.views import ViewBatch, Views, view_batches


class SequencePairRow(TypedDict):
    """One preference."""

    chosen_id: NotRequired[str]
    rejected_id: NotRequired[str]
    chosen_token_ids: list[int]
    """Prompt and chosen response."""
    rejected_token_ids: list[int]
    weight: NotRequired[float]
    """Factor of the pair's loss; 1 if it is missing."""


@dataclass(frozen=True, kw_only=True)
class RewardModelJob(EvaluatedJob):
    """Rows are `SequencePairRow`s."""

    start: Checkpoint
    """M1: the backbone starts there."""
    training: EvaluatedTrainingConfig
    pooling: Pooling
    random_head: bool = False
    """Start the head at N(0, 1 / (hidden size + 1)), drawn by the seed, not at zero: the members of an ensemble differ
    from the first step on."""
    bottleneck: BottleneckConfig | None = None
    """Of the head; None reads the reward off the hidden state itself."""
    views: Views | None = None
    """The prompts of unsupervised multi-view learning; None is Bradley-Terry alone."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs: `tokens` holds the B chosen sequences first, then the B rejected ones."""

    tokens: TokenBatch
    weights: Tensor
    code_seed: int | None = None
    """Draws the codes of a bottleneck; None reads the reward of their means."""

    def to(self, device: torch.device) -> "PairBatch":
        return replace(self, tokens=self.tokens.to(device), weights=self.weights.to(device))


IDLE_PAIR: SequencePairRow = {"chosen_token_ids": [0], "rejected_token_ids": [0], "weight": 0.0}
"""Stands in on a rank that has no pair while other ranks still work."""


def train_reward_model(job: RewardModelJob, data: launch.Rows[SequencePairRow]) -> None:
    """Train a reward model on this worker's pairs, and export it.

    A pair's loss is multiplied by its weight; the mean is over pairs, not over weights.
    """
    training = job.training
    torch.manual_seed(job.seed)
    with zero.sharded_loading(training, job.torch_dtype):
        reward_model = new_reward_model(
            job.start,
            job.pooling,
            job.torch_dtype,
            lora=training.lora,
            trust_remote_code=job.policy.trust_remote_code,
            z_dim=job.bottleneck.z_dim if job.bottleneck else None,
        )
        # A bottleneck's encoder is drawn by the seed in any case.
        if job.random_head and isinstance(reward_model.head, Float32Linear):
            std = (reward_model.head.in_features + 1) ** -0.5
            torch.nn.init.normal_(reward_model.head.weight, std=std)
        model = MultiViewRewardModel(reward_model, job.views.uml if job.views else None)
        schedule_steps = num_steps(job.num_rows, training, training.batch_size)
        groups: list[zero.ParameterGroup] = []
        if job.views:
            branch = zero.ParameterGroup(parameters=model.branch(), learning_rate=job.views.uml.learning_rate)
            groups.append(branch)
        if job.bottleneck:
            head = list(reward_model.head.parameters())
            groups.append(zero.ParameterGroup(parameters=head, learning_rate=job.bottleneck.learning_rate))
        engine = zero.start(model, training, job.torch_dtype, schedule_steps, groups)
    packed = is_packed(reward_model.backbone)
    engine.train()
    means_idle = pair_batch([IDLE_PAIR]).to(engine.device)
    # Under ZeRO-3 an idle rank has to read the same weights as the others.
    idle = replace(means_idle, code_seed=0) if job.bottleneck else means_idle
    losses = StepLosses(engine, idle, job.bottleneck.beta if job.bottleneck else 0.0)
    views: Iterator[ViewBatch] | None = None

    def held_out(rows: list[SequencePairRow]) -> list[PairBatch]:
        return [batch.to(engine.device) for batch in collated(rows, training.micro_batch_tokens, packed)]

    evaluation = Evaluation(
        job=job,
        training=training,
        num_steps=schedule_steps,
        tables=job.held_out_tables,
        engine=engine,
        collated=held_out,
        summed_loss=lambda batch: pair_losses(engine, batch).losses.sum(),
        weight=lambda batch: len(batch.weights),
        idle=means_idle,
        export=lambda: export_reward_model(engine, reward_model, job.policy, job.checkpoint_url),
    )
    with rank_zero_log(job.run_url, job.stage) as log:
        for step in steps(engine, training, job.seed, data, evaluation.stopping):
            started = time.monotonic()
            pairs = collated(step.rows, training.micro_batch_tokens, packed)
            if job.bottleneck:
                pairs = with_code_seeds(pairs, f"{job.seed} step {step.number} rank {launch.rank()}")
            batches: list[PairBatch | ViewBatch] = [*pairs]
            if job.views:
                if views is None:  # at the first step after a start, which is not always step 1
                    views = view_batches(
                        job.views,
                        job.seed,
                        launch.rank(),
                        launch.world_size(),
                        skip=step.number - 1,
                        num_steps=schedule_steps,
                    )
                # The views' loss is a mean already. Times the number of the step's pairs, it comes out of the step's
                # mean over pairs as lambda L_M.
                num_pairs = zero.sum_over_ranks(len(step.rows), engine)
                # First, on every rank: ZeRO-3 gathers the weights of one forward pass on all of them together.
                batches.insert(0, next(views).weighted(num_pairs))
            moved = [batch.to(engine.device) for batch in batches]
            taken = zero.train_step(engine, moved, losses.summed_loss, len(step.rows), idle, row_names(step.rows))
            meters.TRAINING_TOKENS.add(sum(batch.tokens.num_tokens for batch in batches), stage=job.stage)
            log(
                step.number,
                **taken._asdict(),
                **losses.statistics(),
                learning_rate=engine.get_lr()[0],
                seconds=time.monotonic() - started,
                waited_s=step.waited_s,
                **evaluation.after(step.number),
            )
    evaluation.finish()


class StepLosses:
    """Losses of a step's micro-batches of either kind, and this rank's statistics of them."""

    def __init__(self, model: Callable[..., Any], idle: PairBatch, beta: float = 0.0):
        self.model = model
        self.idle = idle
        self.beta = beta
        self._margins: list[Tensor] = []
        self._pair_losses: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._view_statistics: dict[str, Tensor] = {}

    def summed_loss(self, batch: PairBatch | ViewBatch) -> Tensor:
        """Return the sum of a micro-batch's losses, as `train_step` takes it."""
        if isinstance(batch, ViewBatch):
            loss, mi, skl = self.model(batch.tokens, view_seed=batch.seed, skl_weight=batch.skl_weight)
            self._view_statistics = {
                "view_loss": loss.detach(),
                "mi": mi,
                "skl": skl,
                "skl_weight": torch.tensor(batch.skl_weight),
            }
            return batch.weight * loss
        pairs = pair_losses(self.model, batch, self.beta)
        if batch is not self.idle:  # which has two equal responses
            self._margins.append(pairs.margins.detach())
            self._pair_losses.append(pairs.losses.detach())
            if pairs.divergences is not None:
                self._divergences.append(pairs.divergences.detach())
        return pairs.losses.sum()

    def statistics(self) -> dict[str, Tensor]:
        """Return the statistics since the last call, idle pairs left out.

        Share of the pairs in the right order (a tie is half of one), mean margin and loss of the pairs; mean divergence
        of the codes of a bottleneck, nats per response; information and divergence of the views.
        """
        if not self._margins:  # this rank had no pair
            return self._view_statistics
        margins, losses = torch.cat(self._margins), torch.cat(self._pair_losses)
        codes = {"divergence": torch.cat(self._divergences).mean()} if self._divergences else {}
        self._margins, self._pair_losses, self._divergences = [], [], []
        accuracy = (margins > 0).float().mean() + (margins == 0).float().mean() / 2
        return {
            "accuracy": accuracy,
            "margin": margins.mean(),
            "pair_loss": losses.mean(),
            **codes,
            **self._view_statistics,
        }


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """Losses of B pairs."""

    losses: Tensor
    """(B,), weighted."""
    margins: Tensor
    """(B,), by how much the chosen side is ahead."""
    divergences: Tensor | None = None
    """(2 B,) of the codes of a bottleneck from its prior, nats; chosen ones first."""


def pair_losses(model: Callable[..., Any], batch: PairBatch, beta: float = 0.0) -> PairLosses:
    """Compute the losses of a batch of pairs: Bradley-Terry, or a bottleneck's where the batch draws codes."""
    if batch.code_seed is None:
        chosen, rejected = model(batch.tokens).chunk(2)
        return PairLosses(losses=batch.weights * bradley_terry_loss(chosen, rejected), margins=chosen - rejected)
    rewards, mu, sigma = model(batch.tokens, code_seed=batch.code_seed)
    chosen, rejected = rewards.chunk(2)
    chosen_mu, rejected_mu = mu.chunk(2)
    chosen_sigma, rejected_sigma = sigma.chunk(2)
    codes = (Gaussian(mu=chosen_mu, sigma=chosen_sigma), Gaussian(mu=rejected_mu, sigma=rejected_sigma))
    losses = bottleneck_losses(chosen, rejected, codes, beta=beta)
    return PairLosses(
        losses=batch.weights * losses, margins=chosen - rejected, divergences=kl_to_standard_normal(mu, sigma)
    )


def with_code_seeds(batches: list[PairBatch], name: str) -> list[PairBatch]:
    """Give every micro-batch of a step its own seed of codes, the same whenever the step is done again."""
    return [replace(batch, code_seed=drawn_seed("codes", name, str(i))) for i, batch in enumerate(batches)]


def new_reward_model(
    start: Checkpoint,
    pooling: Pooling,
    dtype: torch.dtype,
    *,
    lora: LoraConfig | None,
    trust_remote_code: bool,
    z_dim: int | None = None,
) -> RewardModel:
    """Put a checkpoint's backbone, with adapters if the training has any, under an untrained head."""
    backbone = load_policy(start, dtype, trust_remote_code=trust_remote_code)
    return RewardModel(add_lora(backbone, lora, start) if lora else backbone, pooling, z_dim)


def collated(rows: list[SequencePairRow], max_tokens: int, packed: bool) -> list[PairBatch]:
    """Collate pairs in micro-batches, each of at most `max_tokens` with its padding, if there is any."""
    lengths = [[len(row["chosen_token_ids"]), len(row["rejected_token_ids"])] for row in rows]
    batches = micro_batches(lengths, max_tokens, is_packed=packed)
    return [pair_batch([rows[i] for i in indices]) for indices in batches]


def pair_batch(rows: list[SequencePairRow]) -> PairBatch:
    """Collate pairs to one micro-batch."""
    chosen = [row["chosen_token_ids"] for row in rows]
    rejected = [row["rejected_token_ids"] for row in rows]
    weights = torch.tensor([row.get("weight", 1.0) for row in rows], dtype=torch.float32)
    return PairBatch(tokens=sequence_batch(chosen + rejected), weights=weights)
