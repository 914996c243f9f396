"""Serving of one checkpoint at a time: each request names the weights that must answer it.

A replica holds the weights of one checkpoint. When a request names another checkpoint, the replica waits until no
request runs, loads the named weights, and only then lets requests start again. So no request is ever answered by
weights that it did not name. Subclasses supply the engine and the loading; nothing here depends on vLLM or Ray.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

from rayrl.records import Checkpoint

LOADING = "loading "
"""Prefix of a replica's version while it is between two checkpoints."""


class ReplicaStatus(TypedDict):
    """A replica's report on itself: the answer to its health check."""

    start_s: float
    """Seconds that its start took."""
    started_at: float
    """When its start ended, as Unix time."""
    swaps_s: list[float]
    """Seconds that each weight swap took, in order."""
    pid: int


class EngineStatus(ReplicaStatus):
    """Report of a replica whose weights can be swapped."""

    version: str
    """Version of the checkpoint that it serves; with the prefix `LOADING` while it swaps."""
    num_received: int
    """Swaps whose weights came straight from a trainer, without a folder."""
    text_difference: float | None
    """Mean absolute difference to the trainer's reading of a text after the last swap to a training's result: of its
    log-probabilities, nats, or of the head's value. None before such a swap."""


class Serving:
    """Base of replicas that serve one checkpoint at a time."""

    def __init__(self, version: str):
        self.version = version
        self._num_running = 0
        self._idle = asyncio.Condition()
        self._swap_lock = asyncio.Lock()

    async def load(self, checkpoint: Checkpoint) -> None:
        """Swap to a checkpoint and set `self.version` to its version. Called with the swap lock held."""
        raise NotImplementedError

    async def adopt(self, checkpoint: Checkpoint, in_flight: bool) -> str:
        """Swap to a checkpoint and return the version that is served afterwards.

        Args:
            checkpoint: the weights.
            in_flight: swap without waiting for running requests; they continue under the new weights.
        """
        if in_flight:
            async with self._swap_lock:
                if checkpoint.version != self.version:
                    await self.load(checkpoint)
        async with self.serving(checkpoint):
            return self.version

    @asynccontextmanager
    async def serving(self, checkpoint: Checkpoint) -> AsyncIterator[None]:
        """Hold a checkpoint's weights while a request runs inside the context."""
        # A request that needs a swap keeps the lock while it waits for the running ones. Requests that come later
        # queue behind it, so that a steady stream of requests for the old weights cannot delay the swap for ever.
        async with self._swap_lock:
            if checkpoint.version != self.version:
                await self._wait_until_idle()
                await self.load(checkpoint)
            self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            async with self._idle:
                self._idle.notify_all()

    async def _wait_until_idle(self) -> None:
        async with self._idle:
            await self._idle.wait_for(lambda: self._num_running == 0)
