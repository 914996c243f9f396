"""How a policy's weights reach the replicas after an update: through a folder, or by vLLM's own transfer."""

import logging
from typing import Any

from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync import export
from rayrl.training.sync.gather import Weights
from rayrl.training.sync.transfer import Sender

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Transfers in a row that may fail; from then on the weights go through the folder."""


class FolderSync:
    """Rank 0 writes a folder, and every replica reads it."""

    def __init__(self, job: Any, engine: Any):
        self.job, self.engine = job, engine

    def publish(self, checkpoint: Checkpoint) -> None:
        """Bring every replica to these weights, proved by the probe. All ranks take part."""
        self.write(checkpoint)
        if launch.rank() == 0:
            self.job.fleet.adopt(checkpoint, in_flight=self.job.ppo.overlap)

    def keep(self, checkpoint: Checkpoint) -> None:
        """See that a replica that restarts finds the published weights: here it does."""

    def write(self, checkpoint: Checkpoint) -> None:
        """The folder alone."""
        export.export_policy(self.engine, self.engine.module.policy, None, checkpoint.path)


class TransferSync:
    """vLLM's transfer brings the weights; the folder is written while the replicas answer, for any that restarts.

    An update that does not reach every replica goes through the folder, and the next one makes a new group.
    """

    def __init__(self, job: Any, engine: Any):
        self.job, self.engine = job, engine
        self._folder = FolderSync(job, engine)
        self._weights = Weights(engine, engine.module.policy)
        self._num_failures = 0
        self._is_written = False
        if launch.rank() == 0:
            empty = [self._weights.published(state) for state in self._weights.empty()]
            self._sender = Sender(job.fleet, job.transport, empty, engine.device)

    def publish(self, checkpoint: Checkpoint) -> None:
        """Bring every replica to these weights, proved by the probe. All ranks take part."""
        self._is_written = self._num_failures >= MAX_FAILURES or not self._sent(checkpoint)
        if self._is_written:
            self._folder.publish(checkpoint)

    def keep(self, checkpoint: Checkpoint) -> None:
        """See that a replica that restarts finds the published weights. All ranks take part, before the next step."""
        if not self._is_written:
            self._folder.write(checkpoint)
            self._is_written = True

    def _sent(self, checkpoint: Checkpoint) -> bool:
        probe = export.policy_probe(self.engine, self.engine.module.policy)
        update = None
        if launch.rank() == 0:
            update = self._sender.send(checkpoint, probe, in_flight=self.job.ppo.overlap)
        for state in self._weights.gathered(self.engine.device):
            if update is not None:
                update.put(self._weights.published(state))
        error = None
        if update is not None:
            update.put(None)
            error = update.error()
        if error is not None:
            logger.warning("%s did not reach every replica (%r) and goes through the folder", checkpoint.version, error)
            self._sender.leave()
        failed = zero.largest(float(error is not None), self.engine) > 0
        self._num_failures = self._num_failures + 1 if failed else 0
        return not failed


def weight_sync(job: Any, engine: Any) -> FolderSync | TransferSync:
    """What the job asks for."""
    return FolderSync(job, engine) if job.transport is None else TransferSync(job, engine)
