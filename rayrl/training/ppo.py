"""Proximal policy optimisation of M1 against a reward, with the KL to M1 held in check (arXiv 2403.19279, section 2).

The whole training is one fit. A step of the loop is a rollout: the fleet answers the prompts, the rewards come back,
the trainer learns from them for a few passes, and the replicas take the new weights, proved by a probe.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rayrl.algorithms import ppo
from rayrl.config import PpoConfig
from rayrl.data.collate import collate
from rayrl.metrics import meters
from rayrl.models.actor_critic import ActorCritic
from rayrl.models.packing import is_packed
from rayrl.models.policy import add_lora, load_policy
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.ppo_job import PpoJob, num_rollouts
from rayrl.training.rollout import Experience, MicroBatch, PromptRow, TokenTargets, evaluate_rollout
from rayrl.training.served_policy import ServedPolicy
from rayrl.training.steps import checkpoint, rank_batches, rank_share, rank_zero_log, restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WATCHED: tuple[str, ...] = ("policy_loss", "value_loss", "clip_fraction", "approximate_kl")
"""Means per token that the curve shows of an update."""


def train_ppo(job: PpoJob, data: launch.Rows[PromptRow]) -> None:
    """Train a policy on this worker's prompts, and export it."""
    config = job.ppo
    engine, reference = start(job)
    noted = {"step": 0, "kl_coef": config.kl_coef, "best_reward": -np.inf} | restore(engine)
    step = int(noted["step"])
    kl_coef = noted["kl_coef"]
    served = ServedPolicy(job, engine, best_reward=noted["best_reward"])
    all_prompts = rollout_prompts(job, data, skip=step)
    prompts = next(all_prompts, [])
    with rank_zero_log(job.run_url, job.stage) as log, ThreadPoolExecutor(1) as background:
        if step:
            served.publish(step)  # the replicas may hold later weights, or M1's
        else:
            log(0, **served.measure(0))
        goes_on = zero.max_over_ranks(len(prompts), engine) > 0
        # In the background: the fleet answers while the folder is written, and with `overlap` during the update.
        sampling = background.submit(served.sample, prompts, step + 1)
        served.ensure_exported()
        while goes_on:
            step, started = step + 1, time.monotonic()
            rollout = sampling.result()
            waited_s = time.monotonic() - started

            prompts = next(all_prompts, [])
            goes_on = zero.max_over_ranks(len(prompts), engine) > 0
            if config.overlap:  # the next rollout begins with the weights before this update
                sampling = background.submit(served.sample, prompts, step + 1)

            experience = evaluate_rollout(engine, reference, rollout, config, kl_coef)
            seen = means(experience.sums, "num_responses", engine)
            learnt = learn(engine, experience, job, step)
            train_s = time.monotonic() - started - waited_s

            sync_s = served.publish(step)
            is_runaway = not seen["kl"] <= config.max_kl  # a KL that is not a number is one too
            if not config.overlap:
                sampling = background.submit(served.sample, [] if is_runaway else prompts, step + 1)
            served.ensure_exported()
            seconds = time.monotonic() - started
            log(
                step,
                **seen,
                **learnt,
                generate_s=rollout.generate_s,
                reward_s=rollout.reward_s,
                train_s=train_s,
                sync_s=sync_s,
                waited_s=waited_s,
                seconds=seconds,
                **served.measure(step, always=not goes_on),
                kl_coef=kl_coef,
                learning_rate=engine.get_lr()[0],
                updates_behind=step - 1 - rollout.step,
            )
            if is_runaway:
                return  # without a policy; the stage raises the error
            kl_coef = next_kl_coef(kl_coef, seen, config)
            if goes_on and step % config.checkpoint_every == 0:
                checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)
    served.finish()
    checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)


def start(job: PpoJob) -> tuple[zero.Engine[ActorCritic], "PreTrainedModel | None"]:
    """Start the engine around policy and value, and the frozen M1.

    With adapters there is no M1 of its own: it is the policy without them.
    """
    config, dtype, trust = job.ppo, job.torch_dtype, job.policy.trust_remote_code
    torch.manual_seed(job.seed)
    reference: PreTrainedModel | None = None
    if not config.lora:
        # Before the others: under ZeRO-3 those are sharded as they load, and M1 stays whole on every rank.
        reference = frozen(load_policy(job.m1, dtype, trust_remote_code=trust))
    updates_per_epoch = -(-config.rollout_size // config.batch_size)
    num_updates = num_rollouts(job.num_rows, config) * config.inner_epochs * updates_per_epoch
    with zero.sharded_loading(config, dtype):
        policy = load_policy(job.m1, dtype, trust_remote_code=trust)
        value = load_policy(job.value_start, dtype, trust_remote_code=trust)
        if config.lora:
            policy, value = add_lora(policy, config.lora), add_lora(value, config.lora)
        engine = zero.start(ActorCritic(policy, value), config, dtype, num_updates)
    return engine, None if reference is None else reference.to(engine.device)  # type: ignore[arg-type]


def frozen(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def rollout_prompts(job: PpoJob, data: launch.Rows[PromptRow], *, skip: int) -> Iterator[list[PromptRow]]:
    """Return this rank's share of the prompts of every rollout after the first `skip`."""
    config = job.ppo
    batches = rank_batches(data, epochs=config.epochs, batch_size=config.rollout_size, seed=job.seed, skip=skip)
    num_left = None if config.max_rollouts is None else max(0, config.max_rollouts - skip)
    return islice(batches, num_left)


def next_kl_coef(kl_coef: float, seen: dict[str, float], config: PpoConfig) -> float:
    """Return the coefficient after a rollout; it stays as it is without a target."""
    if config.target_kl is None:
        return kl_coef
    return ppo.adapted_kl_coef(
        kl_coef,
        seen["kl"],
        target_kl=config.target_kl,
        num_samples=int(seen["num_responses"]),
        horizon=config.kl_horizon,
    )


def learn(engine: zero.Engine[ActorCritic], experience: Experience, job: PpoJob, step: int) -> dict[str, float]:
    """Take the inner epochs over one rollout, and return the `WATCHED` means per token and the loss."""
    config = job.ppo
    share = rank_share(config.batch_size)
    num_batches = int(zero.max_over_ranks(-(-len(experience) // share), engine))
    packed = is_packed(engine.module.policy)
    idle = idle_micro_batch(engine.device)
    sums: dict[str, float] = dict.fromkeys(("num_tokens", *WATCHED), 0.0)

    def summed_loss(micro_batch: MicroBatch) -> Tensor:
        loss, watched = token_losses(engine, micro_batch, config)
        for name, value in watched.items():
            sums[name] += value
        return loss

    engine.train()
    for epoch in range(config.inner_epochs):
        rng = np.random.default_rng([job.seed, step, epoch, launch.rank()])
        order = rng.permutation(len(experience)).tolist()
        for n in range(num_batches):
            rows = order[n * share : (n + 1) * share]
            batches = [
                (tokens.to(engine.device), targets)
                for tokens, targets in experience.micro_batches(rows, config.micro_batch_tokens, packed)
            ]
            num_response_tokens = sum(int(tokens.response_mask.sum()) for tokens, _ in batches)
            names = [experience.ids[i] for i in rows]
            zero.train_step(engine, batches, summed_loss, num_response_tokens, idle, names)
            meters.TRAINING_TOKENS.add(sum(tokens.num_tokens for tokens, _ in batches), stage=job.stage)
    learnt = means(sums, "num_tokens", engine)
    del learnt["num_tokens"]  # it counts every inner epoch
    learnt["loss"] = learnt["policy_loss"] + config.value_coef * learnt["value_loss"]
    return learnt


def idle_micro_batch(device: torch.device) -> MicroBatch:
    """Make a micro-batch without loss, for a rank that has no response while other ranks still work."""
    return collate([[0]], [[]]).to(device), TokenTargets.zeros(1, 0)


def token_losses(
    engine: zero.Engine[ActorCritic], micro_batch: MicroBatch, config: PpoConfig
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a micro-batch, summed over its response tokens, and sums to watch."""
    tokens, targets = micro_batch
    targets = targets.to(engine.device)
    mask = tokens.response_mask
    now = engine(tokens)
    policy_losses = ppo.policy_loss(
        now.logprobs,
        targets.logprobs,
        targets.advantages,
        clip_range=config.clip_range,
        importance=targets.importance,
    )
    value_losses = ppo.value_loss(now.values, targets.values, targets.returns, clip_range=config.value_clip_range)
    log_ratio = (now.logprobs - targets.logprobs).detach()
    is_clipped = ((log_ratio.exp() - 1).abs() > config.clip_range).float()
    policy_loss = torch.where(mask, policy_losses, 0.0).sum()
    value_loss = torch.where(mask, value_losses, 0.0).sum()
    watched = {
        "num_tokens": float(mask.sum()),
        "policy_loss": policy_loss.item(),
        "value_loss": value_loss.item(),
        "clip_fraction": torch.where(mask, is_clipped, 0.0).sum().item(),
        "approximate_kl": -torch.where(mask, log_ratio, 0.0).sum().item(),
    }
    return policy_loss + config.value_coef * value_loss, watched


def means(sums: dict[str, float], per: str, engine: zero.Engine) -> dict[str, float]:
    """Add sums up over the ranks and divide them by one of them; those named num_* are not divided."""
    totals = {name: zero.sum_over_ranks(value, engine) for name, value in sums.items()}
    denominator = max(1.0, totals[per])
    return {name: total if name.startswith("num_") else total / denominator for name, total in totals.items()}
