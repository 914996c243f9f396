"""The policy in training as the replicas serve it: new weights go out after every update, rollouts come back.

Also keeps the best policy by the reward on held-out prompts. How weights travel is in `rayrl.training.sync`.
"""

import math
import time

from rayrl.data.blocks import BlockTable
from rayrl.models.actor_critic import Actor
from rayrl.records import Checkpoint, HeldOutAnswer, to_table
from rayrl.runs import storage
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.ppo_job import PpoJob
from rayrl.training.rollout import PromptRow, Rollout, held_out_answers, sample
from rayrl.training.sync.export import export_policy
from rayrl.training.sync.publish import new_publisher

NUM_HELD_OUT_ANSWERS = 2
"""Responses to each held-out prompt: two, so that they can be compared."""
NUM_KEPT_VERSIONS = 2
"""Folders of weights that are kept: the served version, and the one before it, which a retried request may name."""


class ServedPolicy:
    """Publishes the policy, samples from it, and measures it."""

    def __init__(self, job: PpoJob, engine: zero.Engine[Actor], *, best_reward: float):
        self.best_reward = best_reward
        """Highest held-out reward so far."""
        self._job = job
        self._engine = engine
        self._policy = engine.module.policy
        self._step = 0
        self._served = job.m1
        self._measured_step = -1  # none yet
        self._publisher = new_publisher(engine, self._policy, job.fleet, job.transport, in_flight=job.ppo.overlap)

    def sample(self, prompts: list[PromptRow], step: int) -> Rollout:
        """Sample this rank's part of the rollout of a step, by the weights that are served when this is called."""
        return self._sample(prompts, f"{self._job.seed} step {step}", self._job.ppo.k)

    def publish(self, step: int) -> float:
        """Bring the trainer's weights to every replica, each checked by its sums, and return the seconds it took.

        All ranks take part.
        """
        started = time.monotonic()
        job = self._job
        checkpoint = Checkpoint(path=self._weights_folder(step), version=f"{job.m1.version}-{job.stage}-{step}")
        self._publisher.publish(checkpoint)
        if launch.rank() == 0:
            storage.remove_folder(self._weights_folder(step - NUM_KEPT_VERSIONS))
        zero.barrier(self._engine)  # no rank may ask for these weights before they are there
        self._served, self._step = checkpoint, step
        return time.monotonic() - started

    def ensure_exported(self) -> None:
        """See that a replica that restarts finds the published weights. All ranks take part, before the next update."""
        if self._step > 0:
            self._publisher.ensure_exported(self._served)

    def measure(self, step: int, *, always: bool = False) -> dict[str, float]:
        """Measure the mean reward on the held-out prompts, and keep the responses, and the policy if it is the best.

        Empty if this step is not to be measured. All ranks take part.
        """
        job = self._job
        is_due = always or step % job.ppo.evaluate_every == 0
        if not is_due or step == self._measured_step:
            return {}
        self._measured_step = step
        prompts = job.held_out[launch.rank() :: launch.world_size()]
        # Seeds do not depend on the step: measurements differ by the policy, and not by the sampling.
        rollouts = [self._sample(prompts, f"{job.seed} held out {i}", k=1) for i in range(NUM_HELD_OUT_ANSWERS)]
        answers: list[HeldOutAnswer] = []
        for rollout in rollouts:
            answers += held_out_answers(rollout)
        folder = f"{job.held_out_url}/{step}"
        if launch.rank() == 0:
            storage.remove_folder(folder)  # an earlier attempt may have had more ranks
        zero.barrier(self._engine)
        table = BlockTable(folder, launch.world_size())
        table.write(launch.rank(), to_table(answers, HeldOutAnswer))
        rewards = [answer.reward for answer in answers if answer.reward is not None]
        num_rewards = zero.sum_over_ranks(len(rewards), self._engine)
        total = zero.sum_over_ranks(sum(rewards), self._engine)
        mean = total / num_rewards if num_rewards else math.nan
        if mean > self.best_reward:  # never for a mean of nothing
            self.best_reward = mean
            self._export(job.best_url)
        return {"held_out_reward": mean}

    def finish(self) -> None:
        """Export the last policy, which is also the best one if no response was ever rewarded."""
        self._export(self._job.checkpoint_url)
        if self.best_reward == -math.inf:
            self._export(self._job.best_url)

    def _sample(self, prompts: list[PromptRow], seed: str, k: int) -> Rollout:
        job = self._job
        return sample(job.fleet, self._served, prompts, job.sampling, job.rewards, step=self._step, seed=seed, k=k)

    def _export(self, url: str) -> None:
        export_policy(self._engine, self._policy, self._job.policy, url)

    def _weights_folder(self, step: int) -> str:
        return f"{self._job.sync_url}/{step}"
