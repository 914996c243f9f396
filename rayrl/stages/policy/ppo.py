"""Stage ppo: M1 -> pi against a reward, with the generation fleet answering the rollouts."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrl.config import PpoConfig, RunConfig
from rayrl.engines.generator import Sampling
from rayrl.errors import TrainingStopped
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.oracles.scripted import load_function, source_of
from rayrl.records import Checkpoint, Scored, content_id
from rayrl.runs import storage
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.stages.rewards.reward_models import Reward
from rayrl.training.ppo import PpoJob, train_ppo
from rayrl.training.sync.transfer import Transport, nccl_init_info

HELD_OUT = "held_out"
NUM_VERSIONS = 4
"""Of the weights that may lie in shared memory at once: the last two, the next one being written, and room."""
MAX_HELD_OUT = 256
"""Held-out prompts on which the reward is measured along the way."""


@dataclass(frozen=True)
class FunctionReward:
    """A Python function of (prompt, response); None abstains."""

    path: str

    @property
    def key(self) -> str:
        """Another text of the function's module is another reward."""
        return content_id(self.path, source_of(self.path, "ppo.function"))

    @property
    def value_path(self) -> None:
        """A value function starts from M1."""
        return None

    def serve(self, services: Services) -> "FunctionReward":
        """Itself: it needs no engine."""
        del services
        return self

    def score(self, items: list[Scored]) -> list[float | None]:
        """The function's value of each response."""
        function = load_function(self.path, "ppo.function")
        values = [function(item.prompt, item.response) for item in items]
        return [None if value is None else float(value) for value in values]


def ppo(run: Run, services: Services, m1: Checkpoint, reward: Reward, pool: Pool, stage: str = "ppo") -> Checkpoint:
    """pi: PPO from M1 against a reward; the last policy, or the best on the held-out prompts (`ppo.keep`).

    Args:
        run: the run.
        services: fleets; the generators answer the rollouts while the training goes on.
        m1: start and reference.
        reward: who says what a response is worth.
        pool: prompts to answer, and those on which the reward is measured.
        stage: name of the stage; a second PPO has its own.

    Raises:
        TrainingStopped: the policy ran away from M1.
    """
    config = run.config.ppo
    # Both policies are there, whichever goes on, and they are the same by whatever way they reach the replicas.
    same = config.model_copy(update={"keep": "last", "weight_transfer": "auto"})
    sampling = [run.config.generate.max_tokens, *run.config.generate.stop]
    key = run.key(stage, same, reward.key, pool.key, m1.version, services.dtype, *sampling)
    kept = "best" if config.keep == "best" else "checkpoint"
    checkpoint = Checkpoint(path=run.folder(stage, kept), version=f"{stage}-{key}-{kept}")
    if run.finished(stage, key):
        return checkpoint
    started = time.monotonic()
    job = _job(run, services, m1, reward, pool, stage, key)
    by_rollout = config.model_copy(update={"batch_size": config.rollout_size})
    try:
        curve = fit_stage(run, services, stage, train_ppo, job, by_rollout, stream_of(pool.train, job.seed))
    finally:
        storage.remove_folder(job.sync_url)
    measured = read_metrics(storage.join(run.url, "metrics", f"{stage}.jsonl"))
    steps = [row for row in measured if row["step"]]  # at 0 M1 was measured
    if not steps[-1]["kl"] <= config.max_kl:
        raise TrainingStopped(
            f"{stage}: the policy is {steps[-1]['kl']:.1f} nats per response away from M1 after rollout "
            f"{steps[-1]['step']}, and ppo.max_kl is {config.max_kl:g}; raise ppo.kl_coef, lower ppo.learning_rate, or "
            "set ppo.target_kl"
        )
    metrics = curve | summarise(measured, config)
    run.finish(
        stage,
        key,
        since=started,
        num_rows=int(sum(row["num_responses"] for row in steps)),
        metrics=metrics,
        summary=f"{len(steps)} rollouts, reward {metrics['first_reward']:.3f} -> {metrics['final_reward']:.3f}, "
        f"KL {metrics['final_kl']:.2f} nats, {metrics['samples_per_s']:.1f} samples/s",
    )
    return checkpoint


def _job(run: Run, services: Services, m1: Checkpoint, reward: Reward, pool: Pool, stage: str, key: str) -> PpoJob:
    config = run.config
    held_out = [row for block in pool.held_out.blocks() for row in block.to_pylist()]
    fleet = services.generators(m1)  # if they are not up, these engines and the reward's come up side by side
    return PpoJob(
        stage=stage,
        run_url=run.url,
        checkpoint_url=run.folder(stage, "checkpoint"),
        best_url=run.folder(stage, "best"),
        held_out_url=run.folder(stage, HELD_OUT),
        sync_url=sync_folder(run, stage, key, m1, on_gpu=services.on_gpu),
        transport=transport(config),
        m1=m1,
        policy=config.policy,
        value_path=reward.value_path or m1.path,
        ppo=config.ppo,
        sampling=rollout_sampling(config),
        rewards=reward.serve(services),
        fleet=services.ready(fleet),
        held_out=held_out[:MAX_HELD_OUT],
        dtype=services.dtype,
        seed=int(content_id(stage, str(config.seed)), 16) >> 1,  # a second PPO on the same reward is another run
        num_rows=pool.num_prompts,
    )


def transport(config: RunConfig) -> Transport | None:
    """What brings weights to the generators, None for a folder."""
    if config.ppo.weight_transfer != "nccl":
        return None
    return Transport(init_info=nccl_init_info, ranks_per_replica=config.generators.num_ranks)


def rollout_sampling(config: RunConfig) -> Sampling:
    """How a rollout's responses are sampled."""
    return Sampling(temperature=1.0, max_tokens=config.generate.max_tokens, stop=tuple(config.generate.stop))


def sync_folder(run: Run, stage: str, key: str, m1: Checkpoint, *, on_gpu: bool) -> str:
    """Where weights go on their way to the replicas: shared memory if all is on one machine and fits, else the run."""
    import ray

    memory, m1_folder = Path("/dev/shm"), Path(storage.local_folder(m1.path))
    is_one_machine = len([node for node in ray.nodes() if node["Alive"]]) == 1 and not on_gpu
    if not (is_one_machine and memory.is_dir() and m1_folder.is_dir()):
        return run.folder(stage, "weights")
    num_bytes = sum(file.stat().st_size for file in m1_folder.glob("*.safetensors"))
    fits = shutil.disk_usage(memory).free > NUM_VERSIONS * num_bytes
    return str(memory / f"rayrl-{content_id(run.url, stage, key)}") if fits else run.folder(stage, "weights")


def summarise(steps: list[dict[str, Any]], config: PpoConfig) -> dict[str, Any]:
    """What a training's curve comes to: where the reward and the KL went, and where the time did."""
    held_out = [row["held_out_reward"] for row in steps if row.get("held_out_reward") is not None]
    steps = [row for row in steps if row["step"]]
    last = steps[-max(1, len(steps) // 10) :]
    times = {
        name: float(np.sum([row[name] for row in steps])) for name in ("generate_s", "reward_s", "train_s", "sync_s")
    }
    seconds = float(np.sum([row["seconds"] for row in steps]))
    return times | {
        "first_reward": steps[0]["reward"],
        "final_reward": float(np.mean([row["reward"] for row in last])),
        "best_held_out_reward": max(held_out, default=None),
        "final_kl": float(np.mean([row["kl"] for row in last])),
        "num_responses": int(sum(row["num_responses"] for row in steps)),
        "samples_per_s": sum(row["num_responses"] for row in steps) / max(1e-9, seconds),
        "sync_share": times["sync_s"] / max(1e-9, seconds),
        "overlap": config.overlap,
    }
