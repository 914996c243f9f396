"""Requests name the weights they are to be answered by: a replica holds the ones, and swaps for the others.

It swaps once nobody runs on what it holds, and nobody starts meanwhile. What an engine is, and how it swaps, is for the
subclasses to say.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rayrl.records import Checkpoint

LOADING = "loading "
"""Before the version of a replica that is between two."""


class Serving:
    """One checkpoint at a time."""

    def __init__(self, version: str):
        self.version = version
        self._running = 0
        self._idle = asyncio.Condition()
        self._swap = asyncio.Lock()

    async def load(self, checkpoint: Checkpoint) -> None:
        """Swap to a checkpoint, whose version is `self.version` from then on. Nobody else does so at the time."""
        raise NotImplementedError

    async def adopt(self, checkpoint: Checkpoint, in_flight: bool) -> str:
        """Swap to a checkpoint; the version that is served.

        Args:
            checkpoint: the weights.
            in_flight: do not wait for running requests: they go on under the new weights.
        """
        if in_flight:
            async with self._swap:
                if checkpoint.version != self.version:
                    await self.load(checkpoint)
        async with self.serving(checkpoint):
            return self.version

    @asynccontextmanager
    async def serving(self, checkpoint: Checkpoint) -> AsyncIterator[None]:
        """Hold a checkpoint's weights while a request runs."""
        async with self._swap:
            if checkpoint.version != self.version:
                await self._until_idle()
                await self.load(checkpoint)
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            async with self._idle:
                self._idle.notify_all()

    async def _until_idle(self) -> None:
        async with self._idle:
            await self._idle.wait_for(lambda: self._running == 0)
