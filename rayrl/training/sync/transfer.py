"""Weights from the trainer's memory into the replicas', by vLLM's own weight transfer, with no folder in between.

On GPUs this is NCCL: rank 0 of the training and every rank of every replica are one group; what rank 0 broadcasts, each
replica loads as it comes. A replica that is new makes the group anew. Nothing that fails here stops a training: whoever
waits in a broken group is ended (Ray starts it again), and the update is over, with an error to act upon.

    training, every rank   gather a bucket, put it         in the main thread: collectives meet, whatever happens
    training, rank 0       vLLM's engine broadcasts it     in a thread, which may fail or hang
    replica                pause, load, reset the prefix cache, resume, answer the probe: one call
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from types import SimpleNamespace
from typing import Any

import ray
import torch
from torch import Tensor

from rayrl.errors import StageTimeout
from rayrl.fleets.fleet import START_TIMEOUT_S, Fleet
from rayrl.fleets.router import LEASE_S, Lease
from rayrl.records import Checkpoint

POLL_S = 0.2
PACKED_BYTES = 256 << 20
"""Of each of the two buffers in which a broadcast travels."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """Which engine of vLLM's carries the weights. The replicas are started with the same one (`EngineSpec`)."""

    init_info: Callable[..., Any]
    """(rank, master_address, master_port, world_size) -> the engine's `TrainerInitInfo`."""
    ranks_per_replica: int = 1
    timeout_s: float = 300.0
    """For a group to form, and for an update to be received and proved."""


def nccl_init_info(**group: Any) -> Any:
    """Broadcasts over NCCL."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(packed_buffer_size_bytes=PACKED_BYTES, **group)


class Update:
    """One update on its way: buckets go in on one side, and out on the other, until it succeeds or fails."""

    def __init__(self, checkpoint: Checkpoint, probe: dict[str, Any], in_flight: bool, timeout_s: float):
        self.checkpoint, self.probe, self.in_flight = checkpoint, probe, in_flight
        self._deadline = time.monotonic() + timeout_s
        self._buckets: Queue[dict[str, Tensor] | None] = Queue(1)
        self._outcome: Future[None] = Future()

    def put(self, bucket: dict[str, Tensor] | None) -> None:
        """Hand over the next bucket, or None after the last. It is dropped once the update has failed."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # it is read on another stream
        while not self._outcome.done():
            with suppress(Full):
                return self._buckets.put(bucket, timeout=POLL_S)
            self._end_if_late()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (bucket := self._next()) is not None:
            for name, weight in bucket.items():
                if weight.is_cuda:
                    weight.record_stream(torch.cuda.current_stream())  # not to be reused before that stream has read it
                yield name, weight

    def _next(self) -> dict[str, Tensor] | None:
        while True:
            self.go_on()
            with suppress(Empty):
                return self._buckets.get(timeout=POLL_S)

    def go_on(self) -> None:
        """Raise what the update failed with, if it has."""
        if self._outcome.done():
            self._outcome.result()

    def end(self, error: BaseException | None = None) -> None:
        """The update has succeeded, or failed; the first to say so is believed."""
        with suppress(InvalidStateError):
            self._outcome.set_exception(error) if error else self._outcome.set_result(None)

    def error(self) -> BaseException | None:
        """Wait for the end; what went wrong, if anything did."""
        while not self._outcome.done():
            with suppress(TimeoutError):
                return self._outcome.exception(timeout=POLL_S)
            self._end_if_late()
        return self._outcome.exception()

    def _end_if_late(self) -> None:
        if time.monotonic() > self._deadline:
            self.end(StageTimeout(f"{self.checkpoint.version} was not sent to every replica in time"))


class Receivers:
    """The replicas of a group as vLLM's trainer engine drives them (its `VLLMWeightSyncClient`).

    Their leases are held while an update is under way: a fleet that shrinks then lets others go, or waits.
    """

    def __init__(self, fleet: Fleet, transport: Transport, update: Update, leases: list[Lease]):
        self.update, self.leases = update, leases
        self._fleet, self._transport = fleet, transport

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Bring every replica into the group; its ranks follow those of the replicas before it."""
        each, timeout_s = self._transport.ranks_per_replica, self._transport.timeout_s
        offsets = [1 + n * each for n in range(len(self.leases))]
        self._all([("join", (init_info | {"rank_offset": offset}, timeout_s)) for offset in offsets])

    def start_weight_update(self) -> None:
        """Nothing yet: a replica's swap is one call, so that a trainer that dies leaves none paused."""

    def update_weights(self, update_info: Any) -> None:
        """The swap of every replica, while the trainer broadcasts."""
        of = self.update
        swap = of.checkpoint, of.probe, update_info, of.in_flight, self._transport.timeout_s
        self._all([("receive", swap)] * len(self.leases))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing more: see above."""

    def _all(self, asked: list[tuple[str, tuple[Any, ...]]]) -> None:
        """One call of each, and all answers; if one fails, the others, in a broken group, are ended with it.

        A retry would meet a new replica, which is in no group.
        """
        calls = {
            lease.replica.__getattr__(method).options(max_task_retries=0).remote(*arguments): lease.replica
            for lease, (method, arguments) in zip(self.leases, asked, strict=True)
        }
        pending, deadline = list(calls), time.monotonic() + 2 * self._transport.timeout_s
        try:
            while pending:
                wait_s = min(LEASE_S / 4, deadline - time.monotonic())
                if wait_s <= 0:
                    raise StageTimeout(f"{self._fleet.name}: {len(pending)} replicas did not take part in time")
                done, pending = ray.wait(pending, timeout=wait_s)
                ray.get(done)
                self._fleet.renew(self.leases)
        except Exception as error:
            self.update.end(error)  # vLLM's engine, which may hang in the broadcast, would not say so
            for call in pending:
                ray.kill(calls[call], no_restart=False)
            raise


class Sender:
    """Rank 0's end of the group, and what vLLM reads the weights from (its `WeightSource`)."""

    def __init__(self, fleet: Fleet, transport: Transport, empty: list[dict[str, Tensor]], device: torch.device):
        self._fleet, self._transport, self._empty, self._device = fleet, transport, empty, device
        self._engine: Any = None
        self._client: Any = None
        self._members: list[tuple[str, float]] = []

    def send(self, checkpoint: Checkpoint, probe: dict[str, Any], *, in_flight: bool) -> Update:
        """Begin an update: put the buckets in, then None, then ask for its `error`."""
        update = Update(checkpoint, probe, in_flight, START_TIMEOUT_S + 4 * self._transport.timeout_s)
        threading.Thread(target=self._run, args=(update,), daemon=True).start()
        return update

    def leave(self) -> None:
        """Give the group up, and whatever hangs in it; the next update makes another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def metadata(self) -> list[Any]:
        """Name, type and shape of every weight, in order."""
        named = ((name, weight) for state in self._empty for name, weight in state.items())
        return [SimpleNamespace(name=name, dtype=w.dtype, shape=tuple(w.shape)) for name, w in named]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._client.update)

    def _run(self, update: Update) -> None:
        leases: list[Lease] = []
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # every thread has its own
            leases = self._fleet.hold()
            statuses = self._fleet.statuses(leases)
            members = [(lease.name, status["started_at"]) for lease, status in zip(leases, statuses, strict=True)]
            update.go_on()
            if self._engine is None or members != self._members:
                self.leave()
                self._engine = self._group(update, leases)
                self._members = members
            self._client.update, self._client.leases = update, leases
            self._engine.send_weights()
        except BaseException as error:
            update.end(error)
            self._fleet.release(leases, "suspect")
        else:
            update.end()
            self._fleet.release(leases)

    def _group(self, update: Update, leases: list[Lease]) -> Any:
        """The trainer's end of a new group, with all replicas in it."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.utils.network_utils import get_open_port

        self._client = client = Receivers(self._fleet, self._transport, update, leases)
        info = self._transport.init_info(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + len(leases) * self._transport.ranks_per_replica,
        )
        engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self)  # type: ignore[arg-type]
        try:
            update.go_on()
        except BaseException:
            engine.shutdown()  # too late: nobody waits for it any more
            raise
        return engine
