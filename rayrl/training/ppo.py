"""Proximal policy optimisation of M1 against a reward, with the KL to M1 held in check (arXiv 2403.19279, section 2).

The whole training is one fit. A step of the loop is a rollout: the fleet answers the prompts, the rewards come back,
the trainer learns from them for a few passes, and the replicas take the new weights, proved by their sums.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from rayrl.algorithms import ppo
from rayrl.config import PpoConfig
from rayrl.data.batches import share
from rayrl.data.collate import collate
from rayrl.metrics import meters
from rayrl.models.actor_critic import Actor, ActorCritic
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy, turn_off_dropout
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.ppo_job import PpoJob
from rayrl.training.rollout import Experience, MicroBatch, PromptRow, TokenTargets, evaluate_rollout
from rayrl.training.served_policy import ServedPolicy
from rayrl.training.steps import checkpoint, rank_batches, rank_zero_log, restore

WATCHED: tuple[str, ...] = ("loss", "policy_loss", "clip_fraction", "approximate_kl")
"""Means per token that the curve shows of an update; with a value function also its loss."""


def train_ppo(job: PpoJob, data: launch.Rows[PromptRow]) -> None:
    """Train a policy on this worker's prompts, and export it."""
    config = job.ppo
    engine, reference = start(job)
    noted = {"step": 0, "kl_coef": config.kl_coef, "best_reward": -np.inf} | restore(engine)
    step = int(noted["step"])
    kl_coef = noted["kl_coef"]
    served = ServedPolicy(job, engine, best_reward=noted["best_reward"])
    all_prompts = rollout_prompts(job, data, skip=step)
    prompts = next(all_prompts, None)
    with rank_zero_log(job.run_url, job.stage) as log, ThreadPoolExecutor(1) as background:
        if step:
            served.publish(step)  # the replicas may hold later weights, or M1's
        else:
            log(0, **served.measure(0))
        # In the background: the fleet answers while the folder is written, and with `overlap` during the update.
        sampling = background.submit(served.sample, prompts or [], step + 1)
        served.ensure_exported()
        while prompts is not None:
            step, started = step + 1, time.monotonic()
            rollout = sampling.result()
            waited_s = time.monotonic() - started

            prompts = next(all_prompts, None)
            if config.overlap:  # the next rollout begins with the weights before this update
                sampling = background.submit(served.sample, prompts or [], step + 1)

            experience = evaluate_rollout(engine, reference, rollout, config, kl_coef)
            seen = means(experience.sums, "num_responses", engine)
            seen["sampler_difference"] /= max(1.0, seen["length"])  # per token
            learnt = learn(engine, Experience.joined(zero.gathered(experience)), job, step)
            train_s = time.monotonic() - started - waited_s

            sync_s = served.publish(step)
            is_runaway = not seen["kl"] <= config.max_kl  # a KL that is not a number is one too
            if not config.overlap:
                sampling = background.submit(served.sample, [] if is_runaway else prompts or [], step + 1)
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
                **served.measure(step, always=prompts is None),
                kl_coef=kl_coef,
                learning_rate=engine.get_lr()[0],
                updates_behind=step - 1 - rollout.step,
            )
            if is_runaway:
                return  # without a policy; the stage raises the error
            kl_coef = next_kl_coef(kl_coef, seen, config)
            if prompts is not None and step % config.checkpoint_every == 0:
                checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)
    served.finish()
    checkpoint(engine, step, kl_coef=kl_coef, best_reward=served.best_reward)


def start(job: PpoJob) -> tuple[zero.Engine[Actor], nn.Module | None]:
    """Start the engine around the policy, and the value if one is trained, and load the reference."""
    config, dtype, trust = job.ppo, job.torch_dtype, job.policy.trust_remote_code
    torch.manual_seed(job.seed)
    reference = load_reference(job)
    with zero.sharded_loading(config, dtype):
        policy = load_policy(job.m1, dtype, trust_remote_code=trust)
        value = load_policy(job.value_start, dtype, trust_remote_code=trust) if config.trains_value else None
        for network in (policy, value):  # the rollout's log-probabilities and values are read without it
            if network is not None:
                turn_off_dropout(network)
        if config.lora:
            policy = add_lora(policy, config.lora, job.m1)
            value = None if value is None else add_lora(value, config.lora, job.value_start)
        networks = Actor(policy) if value is None else ActorCritic(policy, value)
        groups = parameter_groups(networks, config)
        engine = zero.start(networks, config, dtype, config.num_updates(job.num_rows), groups)
    if reference is not None and config.zero_stage != 3 and not config.reference_offload:
        reference = reference.to(engine.device)
    return engine, reference


def load_reference(job: PpoJob) -> nn.Module | None:
    """Load the frozen M1's log-probabilities, whole into the machine's memory, or sharded by ZeRO-3 as the policy is.

    With adapters there is none: the reference is the policy without them.
    """
    config, dtype = job.ppo, job.torch_dtype
    if config.lora:
        return None

    def load() -> TokenLogprobs:
        m1 = load_policy(job.m1, dtype, trust_remote_code=job.policy.trust_remote_code)
        return TokenLogprobs(m1).eval().requires_grad_(False)

    if config.zero_stage != 3:
        return load()
    return zero.start_frozen(load, config, dtype, offload=config.reference_offload or config.cpu_offload)


def parameter_groups(networks: Actor, config: PpoConfig) -> list[zero.ParameterGroup]:
    """Deal the parameters to the policy's learning rate and the value's; to one, if they are the same."""
    learning_rate, num_waiting = config.value_learning_rate, config.value_warmup_steps
    if learning_rate is None and num_waiting == 0:
        return []
    policy = list(networks.policy.parameters())
    of_policy = set(map(id, policy))
    value = [parameter for parameter in networks.parameters() if id(parameter) not in of_policy]
    return [
        zero.ParameterGroup(parameters=policy, learning_rate=config.learning_rate, num_waiting_steps=num_waiting),
        zero.ParameterGroup(parameters=value, learning_rate=learning_rate or config.learning_rate),
    ]


def rollout_prompts(job: PpoJob, data: launch.Rows[PromptRow], *, skip: int) -> Iterator[list[PromptRow]]:
    """Yield this rank's share of the prompts of every rollout after the first `skip`. All ranks take part."""
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


def learn(engine: zero.Engine[Actor], experience: Experience, job: PpoJob, step: int) -> dict[str, float]:
    """Take the inner epochs over one rollout, and return the `WATCHED` means per token, and the gradient's norm.

    Args:
        engine: the DeepSpeed engine around the networks.
        experience: the whole rollout, of all ranks: each takes its share of every batch of it.
        job: batch size, inner epochs and clipping.
        step: number of the rollout; draws the order with the seed.
    """
    config = job.ppo
    packed = is_packed(engine.module.policy)
    idle = idle_micro_batch(engine.device)
    taken: list[zero.StepResult] = []
    # With their names from the start: a rollout without a response takes no step.
    names_watched = (*WATCHED, "value_loss") if config.trains_value else WATCHED
    sums: dict[str, float] = dict.fromkeys(("num_tokens", *names_watched), 0.0)

    def summed_loss(micro_batch: MicroBatch) -> Tensor:
        loss, watched = token_losses(engine, micro_batch, config)
        for name, value in watched.items():
            sums[name] += value
        return loss

    engine.train()
    for epoch in range(config.inner_epochs):
        order = np.random.default_rng([job.seed, step, epoch]).permutation(len(experience)).tolist()
        for start in range(0, len(order), config.batch_size):
            rows = share(order[start : start + config.batch_size], launch.rank(), launch.world_size())
            batches = [
                (tokens.to(engine.device), targets)
                for tokens, targets in experience.micro_batches(rows, config.micro_batch_tokens, packed)
            ]
            num_response_tokens = sum(int(tokens.response_mask.sum()) for tokens, _ in batches)
            names = [experience.ids[i] for i in rows]
            taken.append(zero.train_step(engine, batches, summed_loss, num_response_tokens, idle, names))
            meters.TRAINING_TOKENS.add(sum(tokens.num_tokens for tokens, _ in batches), stage=job.stage)
    learnt = means(sums, "num_tokens", engine)
    del learnt["num_tokens"]  # it counts every inner epoch
    norms = [step.grad_norm for step in taken if not step.num_skipped]
    learnt["grad_norm"] = float(np.mean(norms)) if norms else float("nan")
    learnt["num_skipped"] = sum(step.num_skipped for step in taken)
    return learnt


def idle_micro_batch(device: torch.device) -> MicroBatch:
    """Make a micro-batch without loss, for a rank that has no response while other ranks still work."""
    return collate([[0]], [[]]).to(device), TokenTargets.zeros(1, 0)


def token_losses(
    engine: zero.Engine[Actor], micro_batch: MicroBatch, config: PpoConfig
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
        clip_range_high=config.clip_range_high,
        importance=targets.importance,
    )
    log_ratio = (now.logprobs - targets.logprobs).detach()
    low, high = ppo.ratio_bounds(config.clip_range, config.clip_range_high)
    is_clipped = ((log_ratio.exp() < low) | (log_ratio.exp() > high)).float()
    loss = policy_loss = torch.where(mask, policy_losses, 0.0).sum()
    watched = {
        "num_tokens": float(mask.sum()),
        "policy_loss": policy_loss.item(),
        "clip_fraction": torch.where(mask, is_clipped, 0.0).sum().item(),
        "approximate_kl": -torch.where(mask, log_ratio, 0.0).sum().item(),
    }
    if now.values is not None and targets.values is not None and targets.returns is not None:
        value_losses = ppo.value_loss(now.values, targets.values, targets.returns, clip_range=config.value_clip_range)
        value_loss = torch.where(mask, value_losses, 0.0).sum()
        watched["value_loss"] = value_loss.item()
        loss = policy_loss + config.value_coef * value_loss
    watched["loss"] = loss.item()
    return loss, watched


def means(sums: dict[str, float], per: str, engine: zero.Engine) -> dict[str, float]:
    """Add sums up over the ranks and divide them by one of them; those named num_* are not divided."""
    totals = {name: zero.sum_over_ranks(value, engine) for name, value in sums.items()}
    denominator = max(1.0, totals[per])
    return {name: total if name.startswith("num_") else total / denominator for name, total in totals.items()}
