"""Proximal policy optimisation of M1 against a reward, with the KL to M1 held in check (arXiv 2403.19279, section 2).

One fit for the whole of it. A step of the loop is a rollout: the fleet answers the prompts, the rewards come back, the
trainer learns from them for a few passes, and the replicas take the new weights, proved by a probe.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.algorithms import ppo
from rayrl.config import PolicyConfig, PpoConfig
from rayrl.data.batches import Row, optimizer_batches
from rayrl.data.collate import TokenBatch, collate
from rayrl.engines.generator import Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.metrics import meters
from rayrl.models.actor_critic import ActorCritic
from rayrl.models.policy import add_lora, load_policy
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.rollout import TENSORS, Experience, experience
from rayrl.training.steps import checkpoint, rank_zero_log, restore
from rayrl.training.sync.served_policy import ServedPolicy
from rayrl.training.sync.transfer import Transport

MicroBatch = tuple[TokenBatch, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PpoJob:
    """Rows are `Prompt`s."""

    stage: str
    run_url: str
    checkpoint_url: str
    best_url: str
    """Where the policy of the highest held-out reward is kept."""
    held_out_url: str
    """Where the answers to the held-out prompts are kept, by step."""
    sync_url: str
    """Folder through which weights reach the replicas, or those that restart: shared memory on one machine."""
    transport: Transport | None = None
    """What brings weights to the replicas without a folder."""
    m1: Checkpoint
    """The start and the reference."""
    policy: PolicyConfig
    value_path: str
    """Whose backbone the value starts from: the reward model's."""
    ppo: PpoConfig
    sampling: Sampling
    fleet: Fleet
    rewards: ServedReward
    held_out: list[Row]
    """Prompts on which the reward is measured along the way."""
    dtype: str
    seed: int
    num_rows: int


def num_rollouts(num_rows: int, config: PpoConfig) -> int:
    """Rollouts of a whole training."""
    rollouts = config.epochs * -(-num_rows // config.rollout_size)
    return min(rollouts, config.max_rollouts or rollouts)


def train_ppo(job: PpoJob, data: launch.Rows) -> None:
    """The worker's loop."""
    config = job.ppo
    engine, reference = start(job)
    noted = {"step": 0, "kl_coef": config.kl_coef, "best_reward": -np.inf} | restore(engine)
    step, kl_coef = int(noted["step"]), noted["kl_coef"]
    served = ServedPolicy(job, engine, best_reward=noted["best_reward"])
    rollouts = prompts_of_rollouts(job, data, skip=step)
    prompts = next(rollouts, [])
    with rank_zero_log(job.run_url, job.stage) as log, ThreadPoolExecutor(1) as ahead:
        if step:
            served.publish(step)
        else:
            log(0, **served.measure(0))
        goes_on = zero.largest(len(prompts), engine) > 0
        asked = ahead.submit(served.answers, prompts, step + 1)
        served.keep()
        while goes_on:
            step, started = step + 1, time.monotonic()
            answers = asked.result()
            waited_s = time.monotonic() - started
            prompts = next(rollouts, [])
            goes_on = zero.largest(len(prompts), engine) > 0
            if config.overlap:  # the next rollout begins with the weights before this update
                asked = ahead.submit(served.answers, prompts, step + 1)
            rollout = experience(engine, reference, answers, config, kl_coef)
            seen = means(rollout.sums, "num_responses", engine)
            learnt = learn(engine, rollout, job, step)
            train_s = time.monotonic() - started - waited_s
            sync_s = served.publish(step)
            ran_away = not seen["kl"] <= config.max_kl
            if not config.overlap:
                asked = ahead.submit(served.answers, [] if ran_away else prompts, step + 1)
            served.keep()
            times = {"generate_s": answers.generate_s, "reward_s": answers.reward_s, "train_s": train_s}
            times |= {"sync_s": sync_s, "waited_s": waited_s, "seconds": time.monotonic() - started}
            log(
                step,
                **seen,
                **learnt,
                **times,
                **served.measure(step, always=not goes_on),
                kl_coef=kl_coef,
                learning_rate=engine.get_lr()[0],
                updates_behind=step - 1 - answers.step,
            )
            if ran_away:
                return  # the stage tells the user
            kl_coef = next_kl_coef(kl_coef, seen, config)
            if goes_on and step % config.checkpoint_every == 0:
                checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)
    served.finish()
    checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)


def prompts_of_rollouts(job: PpoJob, data: launch.Rows, *, skip: int) -> Iterator[list[Row]]:
    """This rank's share of the prompts of every rollout after the first `skip`."""
    config = job.ppo
    share = -(-config.rollout_size // launch.world_size())
    batches = optimizer_batches(data, epochs=config.epochs, batch_size=share, seed=job.seed, skip=skip)
    left = None if config.max_rollouts is None else max(0, config.max_rollouts - skip)
    return (rows for _, rows in islice(batches, left))


def next_kl_coef(kl_coef: float, seen: dict[str, float], config: PpoConfig) -> float:
    """The coefficient after a rollout; it stays as it is without a target."""
    if config.target_kl is None:
        return kl_coef
    return ppo.adapted_kl_coef(
        kl_coef,
        seen["kl"],
        target_kl=config.target_kl,
        num_samples=int(seen["num_responses"]),
        horizon=config.kl_horizon,
    )


def start(job: PpoJob) -> tuple[Any, Any]:
    """The engine around policy and value, and the frozen M1 (None under LoRA: there M1 is the policy unadapted)."""
    torch.manual_seed(job.seed)
    config, dtype = job.ppo, getattr(torch, job.dtype)
    path, trust = storage.local_folder(job.m1.path), job.policy.trust_remote_code
    # Loaded first: under ZeRO-3 from_pretrained shards, and M1 stays whole on every rank.
    reference = None if config.lora else load_policy(path, dtype, trust_remote_code=trust).eval().requires_grad_(False)
    sharding = zero.prepare_zero3(config, dtype)
    policy = load_policy(path, dtype, trust_remote_code=trust)
    value = load_policy(storage.local_folder(job.value_path), dtype, trust_remote_code=trust)
    if config.lora:
        policy, value = add_lora(policy, config.lora), add_lora(value, config.lora)
    updates = num_rollouts(job.num_rows, config) * config.inner_epochs * -(-config.rollout_size // config.batch_size)
    engine = zero.start(ActorCritic(policy, value), config, dtype, updates)
    del sharding
    return engine, None if reference is None else reference.to(engine.device)


def learn(engine: Any, rollout: Experience, job: PpoJob, step: int) -> dict[str, float]:
    """The inner epochs over one rollout; mean losses per token, and how often and how far the ratio moved."""
    config = job.ppo
    share = -(-config.batch_size // launch.world_size())
    num_batches = int(zero.largest(-(-len(rollout) // share), engine))
    nothing = collate([[0]], [[0]])
    nothing = replace(nothing, response_mask=torch.zeros_like(nothing.response_mask)).to(engine.device)
    idle: MicroBatch = nothing, {n: torch.zeros(1, 1) for n in TENSORS}
    names = ("num_tokens", "policy_loss", "value_loss", "clip_fraction", "approximate_kl")
    sums: dict[str, float] = dict.fromkeys(names, 0.0)

    def loss_of(micro: MicroBatch) -> Tensor:
        losses, measured = token_losses(engine, micro, config)
        for name, value in measured.items():
            sums[name] += value
        return losses

    engine.train()
    for epoch in range(config.inner_epochs):
        order = np.random.default_rng([job.seed, step, epoch, launch.rank()]).permutation(len(rollout)).tolist()
        for n in range(num_batches):
            rows = order[n * share : (n + 1) * share]
            micro = [(t.to(engine.device), of) for t, of in rollout.micro_batches(rows, config.micro_batch_tokens)]
            num_tokens = sum(int(tokens.response_mask.sum()) for tokens, _ in micro)
            zero.train_step(engine, micro, loss_of, num_tokens, idle, [rollout.ids[i] for i in rows])
            meters.TRAINING_TOKENS.add(sum(tokens.num_tokens for tokens, _ in micro), stage=job.stage)
    learnt = means(sums, "num_tokens", engine)
    del learnt["num_tokens"]  # of all inner epochs
    return learnt | {"loss": learnt["policy_loss"] + config.value_coef * learnt["value_loss"]}


def means(sums: dict[str, float], per: str, engine: Any) -> dict[str, float]:
    """Sums over all ranks, divided by one of them; numbers (num_*) stay as they are."""
    totals = {name: zero.total(value, engine) for name, value in sums.items()}
    return {n: value if n.startswith("num_") else value / max(1.0, totals[per]) for n, value in totals.items()}


def token_losses(engine: Any, micro: MicroBatch, config: PpoConfig) -> tuple[Tensor, dict[str, float]]:
    """Summed loss of a micro-batch's response tokens, and sums to watch."""
    tokens, rows = micro
    rows = {name: tensor.to(engine.device) for name, tensor in rows.items()}
    now = engine(tokens)
    mask = tokens.response_mask
    policy = ppo.policy_loss(
        now.logprobs,
        rows["logprobs"],
        rows["advantages"],
        clip_range=config.clip_range,
        importance=rows["importance"],
    )
    value = ppo.value_loss(now.values, rows["values"], rows["returns"], clip_range=config.value_clip_range)
    moved = (now.logprobs - rows["logprobs"]).detach()
    clipped = ((moved.exp() - 1).abs() > config.clip_range).float()
    policy, value, moved, clipped = (torch.where(mask, t, 0.0).sum() for t in (policy, value, moved, clipped))
    measured = {"policy_loss": policy, "value_loss": value, "clip_fraction": clipped, "approximate_kl": -moved}
    return policy + config.value_coef * value, {
        "num_tokens": float(mask.sum()),
        **{name: tensor.item() for name, tensor in measured.items()},
    }
