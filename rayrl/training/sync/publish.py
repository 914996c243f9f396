"""Publishing of a policy's weights to a fleet after an update: through a folder, or by direct transfer.

Once a version is published, every replica serves it, proved by the sums of its weights. A replica that restarts later
loads the version's folder, so that one is written in either case.
"""

import logging
from typing import TYPE_CHECKING, Protocol

from rayrl.fleets.fleet import Fleet
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import launch
from rayrl.training.sync.export import export_policy
from rayrl.training.sync.gather import FullWeights
from rayrl.training.sync.transfer import Sender, Transfer, Transport

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Transfers in a row that may fail; from then on the weights go through the folder."""


class Publisher(Protocol):
    """A way to bring the trainer's weights to the replicas."""

    def publish(self, checkpoint: Checkpoint) -> None:
        """Bring every replica to the weights as they are now, under this name. All ranks take part."""
        ...

    def ensure_exported(self, checkpoint: Checkpoint) -> None:
        """Write the folder of the published version, for replicas that restart, if it is not there.

        All ranks take part, before the next optimizer step.
        """
        ...


def new_publisher(
    engine: zero.Engine,
    policy: "PreTrainedModel | PeftModel",
    fleet: Fleet,
    transport: Transport | None,
    *,
    in_flight: bool,
) -> Publisher:
    """Make the publisher for a transport; without one the weights go through folders.

    Args:
        engine: trains the policy.
        policy: what is published.
        fleet: its replicas.
        transport: of direct transfers.
        in_flight: replicas do not wait for running requests, which then span two versions.
    """
    by_folder = FolderPublisher(engine, policy, fleet, in_flight=in_flight)
    if transport is None:
        return by_folder
    return TransferPublisher(engine, policy, fleet, transport, by_folder, in_flight=in_flight)


class FolderPublisher:
    """Rank 0 exports a folder, and every replica loads it."""

    def __init__(self, engine: zero.Engine, policy: "PreTrainedModel | PeftModel", fleet: Fleet, *, in_flight: bool):
        self._engine = engine
        self._policy = policy
        self._fleet = fleet
        self._in_flight = in_flight

    def publish(self, checkpoint: Checkpoint) -> None:
        """Export the folder, and have every replica load it."""
        self.export(checkpoint)
        if launch.rank() == 0:  # one call reaches every replica
            self._fleet.adopt(checkpoint, in_flight=self._in_flight)

    def ensure_exported(self, checkpoint: Checkpoint) -> None:
        """Do nothing: publishing has exported it."""

    def export(self, checkpoint: Checkpoint) -> None:
        """Export the folder alone."""
        export_policy(self._engine, self._policy, None, checkpoint.path)


class TransferPublisher:
    """Weights go straight to the replicas; the folder is exported while they answer already.

    A version whose transfer does not reach every replica is published by the folder, and the next transfer makes a new
    group.
    """

    def __init__(
        self,
        engine: zero.Engine,
        policy: "PreTrainedModel | PeftModel",
        fleet: Fleet,
        transport: Transport,
        by_folder: FolderPublisher,
        *,
        in_flight: bool,
    ):
        self._engine = engine
        self._policy = policy
        self._by_folder = by_folder
        self._in_flight = in_flight
        self._weights = FullWeights(engine, policy)
        self._num_failures = 0
        self._is_exported = False
        self._sender: Sender | None = None
        if launch.rank() == 0:
            described = [self._weights.in_checkpoint_format(bucket) for bucket in self._weights.describe()]
            self._sender = Sender(fleet, transport, described, engine.device)

    def publish(self, checkpoint: Checkpoint) -> None:
        """Transfer the weights; after a failure, publish their folder."""
        # For good: each failure costs the training minutes, and replicas their processes.
        has_given_up = self._num_failures >= MAX_FAILURES
        is_transferred = not has_given_up and self._transfer(checkpoint)
        if not is_transferred:
            self._by_folder.publish(checkpoint)
        self._is_exported = not is_transferred

    def ensure_exported(self, checkpoint: Checkpoint) -> None:
        """Export the folder, unless a failed transfer has led to it already."""
        if not self._is_exported:
            self._by_folder.export(checkpoint)
            self._is_exported = True

    def _transfer(self, checkpoint: Checkpoint) -> bool:
        """Send the weights to every replica, and return whether all of them serve them."""
        # Before the broadcast, whose receivers need them: each replica's swap is one call.
        sums = self._weights.sums(self._engine.device)
        transfer: Transfer | None = None
        if self._sender is not None:
            transfer = self._sender.begin(checkpoint, sums, in_flight=self._in_flight)
        # All ranks go through all buckets even after a failure: gathering is a collective.
        for bucket in self._weights.gather(self._engine.device):
            if transfer is not None:
                transfer.put(self._weights.in_checkpoint_format(bucket))
        has_failed = False
        if self._sender is not None and transfer is not None:
            transfer.put(None)
            error = transfer.wait()
            if error is not None:
                has_failed = True
                logger.warning(
                    "%s did not reach every replica (%r) and goes through the folder", checkpoint.version, error
                )
                self._sender.leave()
        # Rank 0 alone knows; the others have to take part in what follows.
        has_failed = zero.max_over_ranks(float(has_failed), self._engine) > 0
        self._num_failures = self._num_failures + 1 if has_failed else 0
        return not has_failed
