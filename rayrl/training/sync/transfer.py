"""Direct transfer of weights from the trainer's memory into the replicas', by vLLM's weight transfer, without a folder.

On GPUs this is NCCL: rank 0 of the training and every rank of every replica form one group. Rank 0 broadcasts, and each
replica loads the weights as they come. A new replica makes the group anew. No failure here stops a training: calls that
wait in a broken group are killed (Ray starts their replicas again), and the transfer ends with an error, which the
caller answers by publishing a folder.

    training, every rank   gather a bucket, put it         in the main thread: collectives meet, whatever happens
    training, rank 0       vLLM's engine broadcasts it     in a thread, which may fail or hang
    replica                pause, load, reset the prefix cache, compare the sums, resume: one call
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import ObjectRef
from torch import Tensor

from rayrl.engines.weight_sums import Sums
from rayrl.errors import StageTimeout
from rayrl.fleets import actors
from rayrl.fleets.actors import Actor
from rayrl.fleets.fleet import START_TIMEOUT_S, Fleet
from rayrl.fleets.router import LEASE_S, Lease
from rayrl.records import Checkpoint

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, TrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

POLL_S = 0.2
PACKED_BYTES = 256 << 20
"""Of each of the two buffers in which a broadcast travels."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """The backend of vLLM's that carries the weights. The replicas are started with the same one (`EngineSpec`)."""

    init_info: "Callable[..., TrainerInitInfo]"
    """(rank, master_address, master_port, world_size) -> the backend's own settings."""
    ranks_per_replica: int = 1
    timeout_s: float = 300.0
    """For a group to form, and for the weights to be received and proved."""


def nccl_init_info(*, rank: int, master_address: str, master_port: int, world_size: int) -> "NCCLTrainerInitInfo":
    """Describe a group that broadcasts over NCCL."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=master_address,
        master_port=master_port,
        world_size=world_size,
        packed_buffer_size_bytes=PACKED_BYTES,
    )


class Transfer:
    """One version under way. The main thread puts buckets in, the sending thread takes them out, until it ends.

    It ends once, with success or with an error, whichever side reports first. A bucket that is put in afterwards is
    dropped, and taking one out raises.
    """

    def __init__(self, checkpoint: Checkpoint, sums: Sums, in_flight: bool, timeout_s: float):
        self.checkpoint, self.sums, self.in_flight = checkpoint, sums, in_flight
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._buckets: Queue[dict[str, Tensor] | None] = Queue(1)
        self._outcome: Future[None] = Future()

    def put(self, bucket: dict[str, Tensor] | None) -> None:
        """Hand over the next bucket, or None after the last."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the sending thread reads it on another stream
        while not self._outcome.done():
            with suppress(Full):
                return self._buckets.put(bucket, timeout=POLL_S)
            self._end_if_late()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (bucket := self._next_bucket()) is not None:
            for name, weight in bucket.items():
                if weight.is_cuda:
                    weight.record_stream(torch.cuda.current_stream())  # not to be reused before that stream has read it
                yield name, weight

    def _next_bucket(self) -> dict[str, Tensor] | None:
        while True:
            self.raise_if_failed()
            with suppress(Empty):
                return self._buckets.get(timeout=POLL_S)

    def raise_if_failed(self) -> None:
        """Raise the error that the transfer has ended with, if any."""
        if self._outcome.done():
            self._outcome.result()

    def end(self, error: BaseException | None = None) -> None:
        """End the transfer, unless it has ended already."""
        with suppress(InvalidStateError):
            if error is None:
                self._outcome.set_result(None)
            else:
                self._outcome.set_exception(error)

    def wait(self) -> BaseException | None:
        """Wait for the end, and return the error, if any."""
        while not self._outcome.done():
            with suppress(TimeoutError):
                return self._outcome.exception(timeout=POLL_S)
            self._end_if_late()
        return self._outcome.exception()

    def _end_if_late(self) -> None:
        if time.monotonic() > self._deadline:
            self.end(
                StageTimeout(f"{self.checkpoint.version} was not sent to every replica within {self._timeout_s:.0f} s")
            )


class GroupReplicas:
    """The replicas of a group, as vLLM's engine in the trainer drives them (its `VLLMWeightSyncClient`).

    Their leases are held while a transfer is under way: a fleet that shrinks then ends other replicas, or waits.
    """

    def __init__(self, fleet: Fleet, transport: Transport, transfer: Transfer, leases: list[Lease]):
        self.transfer, self.leases = transfer, leases
        self._fleet, self._transport = fleet, transport

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Bring every replica into the group. Rank 0 is the trainer; each replica's ranks follow those before it."""
        ranks, timeout_s = self._transport.ranks_per_replica, self._transport.timeout_s
        infos = [init_info | {"rank_offset": 1 + n * ranks} for n in range(len(self.leases))]
        self._call_all("join", [(info, timeout_s) for info in infos])

    def start_weight_update(self) -> None:
        """Do nothing: a replica's swap is one call, so that a trainer that dies leaves no replica paused."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Swap every replica to the weights, while the trainer broadcasts."""
        transfer = self.transfer
        swap = (transfer.checkpoint, transfer.sums, update_info, transfer.in_flight, self._transport.timeout_s)
        self._call_all("receive", [swap] * len(self.leases))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing: the call of `update_weights` has finished it."""

    def _call_all(self, method: str, arguments: Sequence[tuple[object, ...]]) -> None:
        """Call a method of every replica, and wait for all answers; if one fails, kill the replicas that still wait.

        They are in a broken group, and would wait for ever. Ray must not retry a call: it would meet a new replica,
        which is in no group.
        """
        replicas: dict[ObjectRef, Actor] = {}
        for lease, replica_arguments in zip(self.leases, arguments, strict=True):
            remote_method = getattr(lease.replica, method).options(max_task_retries=0)
            replicas[remote_method.remote(*replica_arguments)] = lease.replica
        pending = list(replicas)
        # Above the replicas' own limit, so that their errors come first.
        limit_s = 2 * self._transport.timeout_s
        deadline = time.monotonic() + limit_s
        try:
            while pending:
                wait_s = min(LEASE_S / 4, deadline - time.monotonic())
                if wait_s <= 0:
                    raise StageTimeout(
                        f"{self._fleet.name}: {len(pending)} replicas did not take part within {limit_s:.0f} s"
                    )
                done, pending = ray.wait(pending, timeout=wait_s)
                ray.get(done)
                self._fleet.renew(self.leases)
        except Exception as error:
            # Ended here, since vLLM's engine may hang in the broadcast and never report the error.
            self.transfer.end(error)
            for call in pending:
                actors.kill(replicas[call], no_restart=False)
            raise


class Sender:
    """Rank 0's end of the group, and the source from which vLLM reads the weights (its `WeightSource`)."""

    def __init__(self, fleet: Fleet, transport: Transport, described: list[dict[str, Tensor]], device: torch.device):
        self._fleet, self._transport, self._device = fleet, transport, device
        self._described = described
        """The buckets that will be sent, as tensors without memory."""
        self._engine: TrainerWeightTransferEngine[Any] | None = None
        self._replicas: GroupReplicas | None = None
        self._members: list[tuple[str, float]] = []
        """Replicas of the group, with their start times: one that has restarted is another member."""

    def begin(self, checkpoint: Checkpoint, sums: Sums, *, in_flight: bool) -> Transfer:
        """Begin a transfer. Put the buckets in, then None, then `wait`."""
        # Replicas may have to start, a group to form, and each replica to receive, load and prove the weights.
        timeout_s = START_TIMEOUT_S + 4 * self._transport.timeout_s
        transfer = Transfer(checkpoint, sums, in_flight, timeout_s)
        threading.Thread(target=self._send, args=(transfer,), daemon=True).start()
        return transfer

    def leave(self) -> None:
        """Give up the group, and whatever hangs in it; the next transfer makes another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def metadata(self) -> "list[ParamMeta]":
        """Return name, type and shape of every weight, in order, as vLLM asks for them."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        found: list[ParamMeta] = []
        for bucket in self._described:
            for name, weight in bucket.items():
                found.append(ParamMeta(name, weight.dtype, tuple(weight.shape)))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self._replicas is not None
        return iter(self._replicas.transfer)

    def _send(self, transfer: Transfer) -> None:
        """Send one version, and end the transfer. Runs in a thread of its own."""
        leases: list[Lease] = []
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # every thread has its own
            leases = self._fleet.hold()
            statuses = self._fleet.statuses(leases)
            members = [(lease.name, status["started_at"]) for lease, status in zip(leases, statuses, strict=True)]
            transfer.raise_if_failed()
            if self._engine is None or self._replicas is None or members != self._members:
                self.leave()
                self._replicas = GroupReplicas(self._fleet, self._transport, transfer, leases)
                self._engine = self._form_group(transfer, self._replicas)
                self._members = members
            self._replicas.transfer, self._replicas.leases = transfer, leases
            self._engine.send_weights()
        except BaseException as error:
            transfer.end(error)
            self._fleet.release(leases, "suspect")
        else:
            transfer.end()
            self._fleet.release(leases)

    def _form_group(self, transfer: Transfer, replicas: GroupReplicas) -> "TrainerWeightTransferEngine[Any]":
        """Form a group with all of these replicas, and return the trainer's end of it."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.utils.network_utils import get_open_port

        info = self._transport.init_info(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + len(replicas.leases) * self._transport.ranks_per_replica,
        )
        engine = WeightTransferTrainerFactory.trainer_init(info, client=replicas, source=self)  # type: ignore[arg-type]
        try:
            transfer.raise_if_failed()
        except BaseException:
            engine.shutdown()  # the transfer was given up meanwhile, and nothing else would leave this group
            raise
        return engine
