"""Direct preference optimisation (arXiv 2305.18290) of M1 on the pseudo-labelled pairs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypedDict

import pyarrow as pa
import torch
from torch import Tensor

from rayrl.algorithms.batching import allocated_tokens, micro_batches
from rayrl.algorithms.preference import desensitised_weights, dpo_loss, mean_nll, on_policy_weights
from rayrl.config import DpoConfig
from rayrl.data.collate import TokenBatch, collate
from rayrl.metrics import meters
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy, turn_off_dropout
from rayrl.records import Checkpoint
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.evaluation import Evaluation
from rayrl.training.job import EvaluatedJob
from rayrl.training.steps import num_steps, rank_batches, rank_zero_log, row_names, steps
from rayrl.training.sync.export import export_policy

Side = Literal["chosen_reference_logprob", "rejected_reference_logprob"]
SIDES: tuple[Side, ...] = ("chosen_reference_logprob", "rejected_reference_logprob")


class References(TypedDict):
    """The reference's log-probabilities of a pair's responses, nats."""

    chosen_reference_logprob: float
    rejected_reference_logprob: float


class PairRow(References):
    """The part of a `PreferencePair` that is trained on."""

    chosen_id: str
    rejected_id: str
    prompt_token_ids: list[int]
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class DpoJob(EvaluatedJob):
    """Rows are `PairRow`s."""

    start: Checkpoint
    """M1: weights to start from, and the reference."""
    dpo: DpoConfig
    reference: str
    """"generation": the rows' own reference log-probabilities; "pass": one pass of M1 before the first step; "none": no
    reference."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs: `tokens` holds the B chosen responses first, then the B rejected ones."""

    names: list[str]
    tokens: TokenBatch
    reference_chosen: Tensor
    reference_rejected: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return replace(
            self,
            tokens=self.tokens.to(device),
            reference_chosen=self.reference_chosen.to(device),
            reference_rejected=self.reference_rejected.to(device),
        )


IDLE_PAIR: PairRow = {
    "chosen_id": "idle",
    "rejected_id": "idle",
    "prompt_token_ids": [0],
    "chosen_token_ids": [0],
    "rejected_token_ids": [0],
    "chosen_reference_logprob": 0.0,
    "rejected_reference_logprob": 0.0,
}
"""Stands in on a rank that has no pair while other ranks still work."""


def train_dpo(job: DpoJob, data: launch.Rows[PairRow]) -> None:
    """Train a policy on this worker's pairs, and export it."""
    dpo = job.dpo
    torch.manual_seed(job.seed)
    with zero.sharded_loading(dpo, job.torch_dtype):
        policy = load_policy(job.start, job.torch_dtype, trust_remote_code=job.policy.trust_remote_code)
        turn_off_dropout(policy)  # the reference has none either
        if dpo.lora:
            policy = add_lora(policy, dpo.lora, job.start)
        schedule_steps = num_steps(job.num_rows, dpo, dpo.batch_size)
        engine = zero.start(TokenLogprobs(policy), dpo, job.torch_dtype, schedule_steps)
    packed = is_packed(policy)
    pairs: Callable[[], Iterator[pa.Table]] = data
    held_out: Callable[[], Iterator[pa.Table]] = job.held_out_tables
    if job.reference == "pass":
        references = reference_pass(engine, job, data, packed)
        pairs, held_out = all_with_references(data, references), all_with_references(held_out, references)
    engine.train()
    idle = pair_batch([IDLE_PAIR]).to(engine.device)
    margins: list[Tensor] = []  # of one step; on a rank without pairs those of the idle pair

    def summed_loss(batch: PairBatch) -> Tensor:
        losses, chosen_rewards, rejected_rewards = pair_losses(engine, batch, dpo)
        margins.append((chosen_rewards - rejected_rewards).detach())
        return losses.sum()

    def on_device(rows: list[PairRow]) -> list[PairBatch]:
        return [batch.to(engine.device) for batch in collated(rows, dpo.micro_batch_tokens, packed)]

    evaluation = Evaluation(
        job=job,
        training=dpo,
        num_steps=schedule_steps,
        tables=held_out,
        engine=engine,
        collated=on_device,
        summed_loss=lambda batch: pair_losses(engine, batch, dpo)[0].sum(),
        weight=lambda batch: len(batch.names),
        idle=idle,
        export=lambda: export_policy(engine, policy, job.policy, job.checkpoint_url),
    )
    with rank_zero_log(job.run_url, job.stage) as log:
        for step in steps(engine, dpo, job.seed, pairs, evaluation.stopping):
            started = time.monotonic()
            batches = on_device(step.rows)
            margins.clear()
            taken = zero.train_step(engine, batches, summed_loss, len(step.rows), idle, row_names(step.rows))
            num_tokens = sum(batch.tokens.num_tokens for batch in batches)
            num_allocated = sum(allocated_tokens(batch.tokens.lengths, is_packed=packed) for batch in batches)
            meters.TRAINING_TOKENS.add(num_tokens, stage=job.stage)
            step_margins = torch.cat(margins)
            log(
                step.number,
                **taken._asdict(),
                reward_margin=step_margins.mean(),
                reward_accuracy=(step_margins > 0).float().mean(),
                learning_rate=engine.get_lr()[0],
                num_tokens=zero.sum_over_ranks(num_tokens, engine),
                padding_share=1 - num_tokens / max(1, num_allocated),
                seconds=time.monotonic() - started,
                waited_s=step.waited_s,
                **evaluation.after(step.number),
            )
    evaluation.finish()


def pair_losses(policy: Callable[..., Any], batch: PairBatch, dpo: DpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each pair, and the implicit rewards of both sides, (B,) each.

    Args:
        policy: a `TokenLogprobs`, or an engine around one.
        batch: the pairs.
        dpo: the loss.
    """
    mask = batch.tokens.response_mask
    weights: Tensor | float = 1.0
    if dpo.weighting == "on_policy":
        logprobs, collisions = policy(batch.tokens, with_collisions=True)  # (2 B, R) each
        chosen_mean, rejected_mean = (-mean_nll(logprobs - collisions, mask)).chunk(2)
        weights = on_policy_weights(chosen_mean, rejected_mean)
    else:
        logprobs = policy(batch.tokens)
    chosen, rejected = side_logprobs(logprobs, mask, dpo.ld_alpha)
    if dpo.reference != "none":
        chosen, rejected = chosen - batch.reference_chosen, rejected - batch.reference_rejected
    chosen_length, rejected_length = mask.sum(1).chunk(2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen,
        rejected,
        beta=dpo.beta,
        loss=dpo.loss,
        label_smoothing=dpo.label_smoothing,
        margin=dpo.margin,
        lengths=(chosen_length, rejected_length) if dpo.length_normalised else None,
    )
    losses = weights * losses
    if dpo.nll_coef > 0:
        nll, _ = mean_nll(logprobs, mask).chunk(2)
        losses = losses + dpo.nll_coef * nll
    return losses, chosen_rewards, rejected_rewards


def side_logprobs(logprobs: Tensor, response_mask: Tensor, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """Sum the log-probabilities of the chosen and of the rejected responses' tokens, (2 B, R) -> (B,) each."""
    chosen_mask, rejected_mask = response_mask.chunk(2)
    weights = torch.cat(desensitised_weights(chosen_mask, rejected_mask, ld_alpha))
    chosen, rejected = (weights * logprobs).sum(1).chunk(2)
    return chosen, rejected


def collated(rows: list[PairRow], max_tokens: int, packed: bool) -> list[PairBatch]:
    """Collate pairs in micro-batches, each of at most `max_tokens` with its padding, if there is any."""
    lengths: list[list[int]] = []
    for row in rows:
        responses = row["chosen_token_ids"], row["rejected_token_ids"]
        lengths.append([len(row["prompt_token_ids"]) + len(response) for response in responses])
    batches = micro_batches(lengths, max_tokens, is_packed=packed)
    return [pair_batch([rows[i] for i in indices]) for indices in batches]


def pair_batch(rows: list[PairRow]) -> PairBatch:
    """Collate pairs to one micro-batch."""
    prompts = [row["prompt_token_ids"] for row in rows]
    chosen = [row["chosen_token_ids"] for row in rows]
    rejected = [row["rejected_token_ids"] for row in rows]
    return PairBatch(
        names=row_names(rows),
        tokens=collate(prompts + prompts, chosen + rejected),
        reference_chosen=_references(rows, "chosen_reference_logprob"),
        reference_rejected=_references(rows, "rejected_reference_logprob"),
    )


def _references(rows: list[PairRow], side: Side) -> Tensor:
    return torch.tensor([row[side] for row in rows], dtype=torch.float32)


def reference_pass(engine: zero.Engine, job: DpoJob, data: launch.Rows[PairRow], packed: bool) -> dict[str, References]:
    """Read M1's log-probabilities of every pair, by the pair's name. All ranks take part.

    They are read once, before the first step, and kept beside the fit: when a worker restarts, the policy is no longer
    M1.

    Returns:
        Those of all pairs on rank 0, which deals the pairs; nothing on the others.
    """
    is_dealing = launch.rank() == 0
    url = storage.join(job.run_url, "stages", job.stage, "references.json")
    if zero.max_over_ranks(is_dealing and storage.exists(url), engine):
        return storage.read_json(url) if is_dealing else {}
    engine.eval()
    references: dict[str, References] = {}
    all_pairs = lambda: chain(data(), job.held_out_tables())  # noqa: E731
    for rows in rank_batches(all_pairs, epochs=1, batch_size=job.dpo.batch_size, seed=job.seed, skip=0):
        batches = collated(rows, job.dpo.micro_batch_tokens, packed)
        # Under ZeRO-3 a forward pass is a collective: ranks with fewer batches read idle ones beside the others.
        for i in range(int(zero.max_over_ranks(len(batches), engine))):
            batch = (batches[i] if i < len(batches) else pair_batch([IDLE_PAIR])).to(engine.device)
            with torch.no_grad():
                logprobs = engine(batch.tokens)
            chosen, rejected = side_logprobs(logprobs, batch.tokens.response_mask, job.dpo.ld_alpha)
            if i < len(batches):
                for pair, c, r in zip(batch.names, chosen.tolist(), rejected.tolist(), strict=True):
                    references[pair] = {"chosen_reference_logprob": c, "rejected_reference_logprob": r}
    parts = zero.gathered(references)
    if not is_dealing:
        return {}
    for part in parts:
        references |= part
    storage.write_json(url, references)
    return references


def all_with_references(
    tables: Callable[[], Iterator[pa.Table]], references: dict[str, References]
) -> Callable[[], Iterator[pa.Table]]:
    """Make a source of pairs one of the same pairs with the log-probabilities of the pass."""
    return lambda: (with_references(table, references) for table in tables())


def with_references(pairs: pa.Table, references: dict[str, References]) -> pa.Table:
    """Put the log-probabilities of the pass in the place of the pairs' own."""
    found = [references[name] for name in row_names(pairs.select(["chosen_id", "rejected_id"]).to_pylist())]
    for side in SIDES:
        column = pa.array([logprobs[side] for logprobs in found], pa.float64())
        pairs = pairs.set_column(pairs.schema.get_field_index(side), side, column)
    return pairs
