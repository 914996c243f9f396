"""The policy as the replicas serve it: its weights go out after every update, its answers and rewards come back."""

import math
import time
from typing import Any

from rayrl.data.batches import Row
from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import load_tokenizer
from rayrl.records import Checkpoint, HeldOutAnswer, to_table
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.rollout import Answers, held_out_answers, sample
from rayrl.training.sync import export
from rayrl.training.sync.publish import weight_sync

NUM_HELD_OUT_ANSWERS = 2
"""To each held-out prompt: two, so that they can be compared."""


class ServedPolicy:
    """What the replicas hold, and the best of what they held."""

    def __init__(self, job: Any, engine: Any, *, best_reward: float):
        self.job = job
        self.engine = engine
        self.best_reward = best_reward
        self._step = 0
        self._before = 0  # a retried request may still name these weights
        self._served: Checkpoint = job.m1
        self._measured_at = -1
        self._sync = weight_sync(job, engine)

    def answers(self, prompts: list[Row], step: int) -> Answers:
        """This rank's answers to the prompts of a step, by the weights that are served when it is called."""
        job = self.job
        return sample(
            job.fleet, self._served, prompts, job.sampling, job.rewards, (self._step, f"{job.seed} step {step}")
        )

    def publish(self, step: int) -> float:
        """Bring the trainer's weights to every replica, proved by the probe; seconds it took. All ranks take part."""
        started = time.monotonic()
        checkpoint = Checkpoint(
            path=f"{self.job.sync_url}/{step}", version=f"{self.job.m1.version}-{self.job.stage}-{step}"
        )
        self._sync.publish(checkpoint)
        if launch.rank() == 0:
            storage.remove_folder(f"{self.job.sync_url}/{self._before}")
        zero.largest(0.0, self.engine)  # nobody asks for these weights before they are there
        self._before, self._served, self._step = self._step, checkpoint, step
        return time.monotonic() - started

    def keep(self) -> None:
        """See that a replica that restarts finds the published weights. All ranks take part, before the next update."""
        if self._step:
            self._sync.keep(self._served)

    def measure(self, step: int, *, always: bool = False) -> dict[str, float]:
        """Mean reward of answers to the held-out prompts when its turn has come; they and the best policy are kept."""
        if step == self._measured_at or not (always or step % self.job.ppo.evaluate_every == 0):
            return {}
        self._measured_at = step
        job = self.job
        mine = job.held_out[launch.rank() :: launch.world_size()]
        said = [
            sample(job.fleet, self._served, mine, job.sampling, job.rewards, (self._step, f"{job.seed} held out {i}"))
            for i in range(NUM_HELD_OUT_ANSWERS)
        ]
        kept = to_table([row for answers in said for row in held_out_answers(answers)], HeldOutAnswer)
        BlockTable(f"{job.held_out_url}/{step}", launch.world_size()).write(launch.rank(), kept)
        rewards = [reward for answers in said for reward in answers.rewards if reward is not None]
        num = zero.total(len(rewards), self.engine)
        mean = zero.total(sum(rewards), self.engine) / num if num else float("nan")
        if mean > self.best_reward:
            self.best_reward = mean
            self._export(job.best_url)
        return {"held_out_reward": mean}

    def finish(self) -> None:
        """Write the last policy, which is the best one if no answer was ever rewarded."""
        self._export(self.job.checkpoint_url)
        if self.best_reward == -math.inf:
            self._export(self.job.best_url)

    def _export(self, url: str) -> None:
        tokenizer = load_tokenizer(self.job.policy)
        export.export_policy(self.engine, self.engine.module.policy, tokenizer, url)
