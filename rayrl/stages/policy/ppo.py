"""Stages ppo and ppo_refreshed: M1 -> pi against a reward, with the generation fleet answering the rollouts."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rayrl.config import PpoConfig, RunConfig
from rayrl.errors import TrainingStopped
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.records import Checkpoint, content_id, drawn_seed
from rayrl.runs import guard, storage
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import FitMetrics, PpoMetrics
from rayrl.runs.stage_table import PPO, Stage
from rayrl.stages.artifacts import Pool
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.stages.rewards.protocol import Reward
from rayrl.stages.sampling.generate import own_sampling
from rayrl.training.ppo import PpoJob, train_ppo
from rayrl.training.sync.transfer import Transport, nccl_init_info

HELD_OUT = "held_out"
"""Folder, inside the stage's, of the answers to the held-out prompts along the training."""
NUM_VERSIONS = 4
"""Versions of the weights that may lie in shared memory at once: the last two, the next one being written, and room."""
MAX_HELD_OUT = 256
"""Held-out prompts on which the reward is measured along the way."""
NOT_IN_KEY = frozenset({"keep"})
"""Settings that leave the training as it is: both policies are kept, whichever goes on."""


def ppo(
    run: Run, services: Services, m1: Checkpoint, reward: Reward, pool: Pool, stage: Stage[PpoMetrics] = PPO
) -> Checkpoint:
    """Train pi by PPO from M1; the last policy, or the best on the held-out prompts (`ppo.keep`).

    Args:
        run: the run.
        services: fleets; the generators answer the rollouts while the training goes on.
        m1: start and reference.
        reward: scores the responses.
        pool: prompts to answer, and those on which the reward is measured.
        stage: the entry of the stage table that this training is.

    Raises:
        TrainingStopped: the policy ran away from M1.
    """
    config = run.config.ppo
    settings = config.science_json(exclude=NOT_IN_KEY)
    # Rollouts are sampled at temperature 1, so of `generate` only what ends a response counts.
    sampling = [run.config.generate.max_tokens, *run.config.generate.stop]
    key = run.key(stage, settings, reward.key, pool.key, m1.version, services.dtype, *sampling)
    kept = "best" if config.keep == "best" else "checkpoint"
    checkpoint = Checkpoint(path=run.folder(stage, kept), version=f"{stage.name}-{key}-{kept}")
    if run.finished(stage, key):
        return checkpoint
    started = time.monotonic()
    job = _job(run, services, m1, reward, pool, stage, key)
    stream = stream_of(pool.train, job.seed)
    try:
        fitted = fit_stage(run, services, stage, train_ppo, job, config, stream, batch_size=config.rollout_size)
    finally:
        # Weights on their way lie in shared memory, which nothing else frees.
        storage.remove_folder(job.sync_url)
    curve = read_metrics(run.curve(stage))
    _refuse_runaway(stage, curve, config)
    metrics = summarise(curve, fitted, config)
    run.finish(
        stage,
        key,
        since=started,
        num_rows=metrics.num_responses,
        metrics=metrics,
        summary=f"{metrics.num_steps} rollouts, reward {metrics.first_reward:.3f} -> {metrics.final_reward:.3f}, "
        f"KL {metrics.final_kl:.2f} nats, {metrics.samples_per_s:.1f} samples/s{_abstentions(metrics)}",
    )
    return checkpoint


def _abstentions(metrics: PpoMetrics) -> str:
    """Write how many responses have no reward, and why; empty if all have one."""
    if not metrics.num_abstained:
        return ""
    return (
        f"; {metrics.num_abstained} responses without a reward ({metrics.num_too_long} too long, "
        f"{metrics.num_timed_out} timed out)"
    )


def _refuse_runaway(stage: Stage, curve: list[dict[str, Any]], config: PpoConfig) -> None:
    """Refuse a policy whose last rollout was further from M1 than `ppo.max_kl`, or at an unknown distance."""
    last = curve[-1]
    # Written so that a KL which is not a number is refused, too.
    if not last["kl"] <= config.max_kl:
        raise TrainingStopped(
            f"{stage.name}: the policy is {last['kl']:.1f} nats per response away from M1 after rollout "
            f"{last['step']}, and ppo.max_kl is {config.max_kl:g}; raise ppo.kl_coef, lower ppo.learning_rate, or "
            "set ppo.target_kl"
        )


def _job(run: Run, services: Services, m1: Checkpoint, reward: Reward, pool: Pool, stage: Stage, key: str) -> PpoJob:
    config = run.config
    held_out = [row for block in pool.held_out.blocks() for row in block.to_pylist()]
    # Asked for before the reward's engines, so that both kinds come up side by side.
    fleet = services.generators(m1)
    return PpoJob(
        stage=stage.name,
        run_url=run.url,
        checkpoint_url=run.folder(stage, "checkpoint"),
        best_url=run.folder(stage, "best"),
        held_out_url=run.folder(stage, HELD_OUT),
        sync_url=sync_folder(run, stage, key, m1, on_gpu=services.on_gpu),
        transport=transport(config),
        m1=m1,
        policy=config.policy,
        value_start=reward.value_start or m1,
        ppo=config.ppo,
        sampling=own_sampling(config.generate),
        rewards=reward.serve(services),
        fleet=services.ready(fleet),
        held_out=held_out[:MAX_HELD_OUT],
        dtype=services.dtype,
        # A second PPO on the same reward is another run of chance.
        seed=drawn_seed(stage.name, str(run.seed)),
        num_rows=pool.num_prompts,
    )


def transport(config: RunConfig) -> Transport | None:
    """Return the way by which weights reach the generators without a folder; None for the folder."""
    if config.ppo.weight_transfer != "nccl":
        return None
    return Transport(init_info=nccl_init_info, ranks_per_replica=config.generators.num_ranks)


def sync_folder(run: Run, stage: Stage, key: str, m1: Checkpoint, *, on_gpu: bool) -> str:
    """Return where weights lie on their way to the replicas.

    Shared memory, if everything is on one machine without GPUs and several versions fit; otherwise the run's folder.
    """
    memory, m1_folder = guard.SHARED_MEMORY, Path(storage.local_folder(m1.path))
    num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if on_gpu or num_nodes != 1 or not memory.is_dir() or not m1_folder.is_dir():
        return run.folder(stage, "weights")
    num_bytes = sum(file.stat().st_size for file in m1_folder.glob("*.safetensors"))
    if shutil.disk_usage(memory).free <= NUM_VERSIONS * num_bytes:
        return run.folder(stage, "weights")
    return str(guard.shared_memory_folder(content_id(run.url, stage.name, key)))


def summarise(curve: list[dict[str, Any]], fitted: FitMetrics, config: PpoConfig) -> PpoMetrics:
    """Say what a training's curve comes to: where the reward and the KL went, and where the time did."""
    held_out = [row["held_out_reward"] for row in curve if row.get("held_out_reward") is not None]
    # Step 0 is M1, measured and not trained.
    steps = [row for row in curve if row["step"] > 0]
    last = steps[-max(1, len(steps) // 10) :]
    seconds = float(np.sum([row["seconds"] for row in steps]))
    num_responses = sum(row["num_responses"] for row in steps)

    def total(name: str) -> float:
        return float(np.sum([row[name] for row in steps]))

    return PpoMetrics(
        **asdict(fitted),
        first_reward=steps[0]["reward"],
        final_reward=float(np.mean([row["reward"] for row in last])),
        best_held_out_reward=max(held_out, default=None),
        final_kl=float(np.mean([row["kl"] for row in last])),
        num_responses=int(num_responses),
        num_abstained=int(total("num_abstained")),
        num_too_long=int(total("num_too_long")),
        num_timed_out=int(total("num_timed_out")),
        samples_per_s=num_responses / max(1e-9, seconds),
        generate_s=total("generate_s"),
        reward_s=total("reward_s"),
        train_s=total("train_s"),
        sync_s=total("sync_s"),
        sync_share=total("sync_s") / max(1e-9, seconds),
        overlap=config.overlap,
        sampler_difference=float(np.mean([row["sampler_difference"] for row in last])),
    )
