"""One vLLM engine and the one way its weights are swapped. Not a scheduler: vLLM batches, Ray restarts.

Every request names the checkpoint it must be answered by. A replica that holds other weights (a stage went by, or Ray
has just restarted it) swaps first: wait for the running requests, pause, load, reset the prefix cache, compare the
probe with the trainer's numbers, resume. So a stale replica cannot answer, and nobody need keep track of who is stale.
Only PPO with `overlap` does not wait: a sequence that is being written goes on under the new weights, and names both.
"""

import asyncio
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rayrl.engines.serving import LOADING, Serving
from rayrl.engines.start import EngineSpec, start_engine
from rayrl.engines.weight_folder import PROBE_FILE, until_there, with_tied_head
from rayrl.errors import StageTimeout, WeightSyncError
from rayrl.metrics import meters, prometheus
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability (nats) or head value between trainer and engine, by dtype."""

CORE_S = 90.0
"""For an answer of vLLM's core, which gives one between two steps."""


class ServedEngine(Serving):
    """An engine that serves one checkpoint at a time. Subclasses add the requests and say how to probe."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec.checkpoint.version)
        started = time.monotonic()
        self.spec = spec
        self.labels = prometheus.replica()
        meters.RESTARTS.add(prometheus.was_restarted(), **self.labels)
        meters.show_state("starting", self.labels)
        self.engine = start_engine(spec, self.labels["fleet"])
        self.start_s = time.monotonic() - started
        meters.START_SECONDS.set(self.start_s, **self.labels)
        self.started_at = time.time()
        self._show_serving()
        self.swaps_s: list[float] = []
        self._num_received = 0
        self._is_core_taken = False

    async def probe(self, expected: dict[str, Any], checkpoint: Checkpoint) -> float:
        """Largest difference between the engine's answer to the probe and the trainer's."""
        raise NotImplementedError

    async def status(self) -> dict[str, Any]:
        """Version, start-up, swaps and how many came without a folder of this replica; also the health check.

        Raises:
            StageTimeout: vLLM's core does not answer, and it is no swap that keeps it.
        """
        await self.engine.check_health()
        try:
            if not self._is_core_taken:
                async with asyncio.timeout(CORE_S):
                    await self.engine.is_sleeping()  # asked for the answer's sake: it comes from the core's process
        except TimeoutError:
            if not self._is_core_taken:
                raise StageTimeout(f"the engine's core has not answered for {CORE_S:.0f} s") from None
        return {
            "version": self.version,
            "start_s": self.start_s,
            "started_at": self.started_at,
            "swaps_s": self.swaps_s,
            "num_received": self._num_received,
            "pid": os.getpid(),
        }

    @asynccontextmanager
    async def serving(self, checkpoint: Checkpoint) -> AsyncIterator[None]:
        """Hold the engine on a checkpoint's weights while a request runs; a replica whose engine dies ends."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with super().serving(checkpoint):
                meters.RUNNING.set(self._running, **self.labels)
                yield
        except EngineDeadError:
            logger.exception("the engine died; this replica ends, and Ray starts another")
            os._exit(1)
        finally:
            meters.RUNNING.set(self._running, **self.labels)

    async def join(self, init_info: dict[str, Any], timeout_s: float) -> None:
        """Enter a trainer's transfer group, and leave the one before."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        async with self._swap:
            with self._or_die("joining a transfer group"):
                async with asyncio.timeout(timeout_s):
                    await self.engine.shutdown_weight_transfer_engine()
                    await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def receive(
        self, checkpoint: Checkpoint, probe: dict[str, Any], update_info: Any, in_flight: bool, timeout_s: float
    ) -> None:
        """Swap to weights that the trainer's group brings, and prove them.

        Raises:
            WeightSyncError: the engine's answer to the probe is not the trainer's.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async def load() -> None:
            async with asyncio.timeout(timeout_s):
                await self.engine.start_weight_update()
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
                await self.engine.finish_weight_update()

        async with self._swap:
            if not in_flight:
                await self._until_idle()
            with self._or_die(f"receiving {checkpoint.version}"):
                await self._replace(checkpoint, probe, load)
        self._num_received += 1

    async def load(self, checkpoint: Checkpoint) -> None:
        """Swap to a folder's weights and prove them, or end this replica."""
        with self._or_die(f"loading {checkpoint.version}"):
            await self.swap(checkpoint)

    @contextmanager
    def _or_die(self, doing: str) -> Iterator[None]:
        """Around what takes vLLM's core for long, and may leave half of the weights in it, or it in a broken group: a
        replica that fails there ends, and Ray starts another.
        """
        self._is_core_taken = True
        try:
            yield
        except WeightSyncError:
            raise  # `_replace` ends this replica, once the error has left
        except Exception:
            logger.exception("%s failed; this replica ends, and Ray starts another", doing)
            os._exit(1)
        finally:
            self._is_core_taken = False

    async def swap(self, checkpoint: Checkpoint, *, reset_cache: bool = True) -> None:
        """Load a folder in place and prove it. A replica that fails dies: half-loaded weights must not speak.

        Raises:
            WeightSyncError: the engine's answer to the probe is not the trainer's.
        """
        if self.spec.weight_transfer is not None:
            await until_there(checkpoint.path)
        folder = Path(await asyncio.to_thread(local_folder, checkpoint.path))
        probe = json.loads((folder / PROBE_FILE).read_text()) if (folder / PROBE_FILE).exists() else None

        async def load() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                weights = await asyncio.to_thread(with_tied_head, folder, Path(scratch))
                await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})

        await self._replace(checkpoint, probe, load, reset_cache=reset_cache)

    async def _replace(
        self,
        checkpoint: Checkpoint,
        probe: dict[str, Any] | None,
        load: Callable[[], Awaitable[None]],
        *,
        reset_cache: bool = True,
    ) -> None:
        started = time.monotonic()
        self.version = f"{LOADING}{checkpoint.version}"
        meters.show_state("swapping", self.labels)
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        await load()
        if reset_cache:  # what running requests have read so far is read again, by the new weights
            await self.engine.reset_prefix_cache(reset_running_requests=self._running > 0)
        await self.engine.resume_generation()
        if probe is not None:
            difference = await self.probe(probe, checkpoint)
            if not difference <= PROBE_TOLERANCE[self.spec.dtype]:
                threading.Timer(1.0, os._exit, (1,)).start()  # after the error has left; Ray starts a clean replica
                raise WeightSyncError(
                    f"replica answers the probe of {checkpoint.version} {difference:.2e} away from the trainer, "
                    f"more than {PROBE_TOLERANCE[self.spec.dtype]:.0e}: the replica is stopped"
                )
        self.version = checkpoint.version
        self.swaps_s.append(time.monotonic() - started)
        meters.SWAPS.add(1, **self.labels)
        meters.SWAP_SECONDS.add(self.swaps_s[-1], **self.labels)
        self._show_serving()
        logger.info("swapped to %s in %.3f s", checkpoint.version, self.swaps_s[-1])

    def _show_serving(self) -> None:
        meters.show_state("serving", self.labels)
        meters.show_weights(self.version, self.labels)
