"""vLLM engine in a Ray actor, with a checked swap of its weights: the base of generation and embedding replicas.

A swap pauses the engine, loads the weights, resets the prefix cache, compares the sums of the weights that the engine
now serves with the trainer's (`rayrl.engines.weight_sums`), and resumes. A replica whose swap fails ends its process,
so that half-loaded weights never answer, and Ray starts another. Since every request names its weights
(`rayrl.engines.serving`), a replica that has just restarted, or that an earlier stage left with other weights, swaps
before it answers; no caller has to track which replicas are stale.

The one exception is PPO with `overlap`: a sequence that is being generated during the swap continues under the new
weights, and its `versions` name both.

Weights that vLLM turns into other numbers cannot be compared: quantised ones, and those of the few families whose
loader computes with them. A replica finds out before its first swap, by the weights that it started with, logs it once,
and swaps unchecked.

Scheduling is not done here: vLLM batches requests, and Ray restarts processes.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rayrl.engines.serving import LOADING, EngineStatus, Serving
from rayrl.engines.start import EngineSpec, start_engine
from rayrl.engines.weight_folder import (
    TextReading,
    expected_sums,
    read_record,
    wait_for_folder,
    weights_folder,
)
from rayrl.engines.weight_sums import Sums, difference, joined
from rayrl.errors import StageTimeout, WeightSyncError
from rayrl.metrics import meters, prometheus
from rayrl.records import Checkpoint

logger = logging.getLogger(__name__)

CORE_TIMEOUT_S = 90.0
"""Longest wait for vLLM's core in a health check. The core answers between two steps, which may be long."""

EXIT_DELAY_S = 1.0
"""Delay before a replica with wrong weights ends, so that its error reaches the caller first."""


class ServedEngine(Serving):
    """vLLM engine that serves one checkpoint at a time. Subclasses add the requests."""

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
        self.text_difference: float | None = None
        self._is_comparable: bool | None = None  # not known before the first swap
        self._num_received = 0
        self._is_core_busy = False

    async def _read_text(self, text: TextReading, checkpoint: Checkpoint) -> float | None:
        """Return the mean absolute difference between the engine's reading of a text and the trainer's.

        Of log-probabilities, nats, or of a head's value. None if this kind of engine reads neither.
        """
        raise NotImplementedError

    async def status(self) -> EngineStatus:
        """Report version, start-up and swaps; also the health check.

        Raises:
            StageTimeout: vLLM's core does not answer, and no swap keeps it busy.
        """
        await self.engine.check_health()
        try:
            # `check_health` only reads this process's state. `is_sleeping` is answered by the core, and its answer
            # shows that the core still works. During a swap the core is busy for long and is not asked.
            if not self._is_core_busy:
                async with asyncio.timeout(CORE_TIMEOUT_S):
                    await self.engine.is_sleeping()
        except TimeoutError:
            if not self._is_core_busy:  # a swap may have begun after the question
                raise StageTimeout(f"the engine's core has not answered for {CORE_TIMEOUT_S:.0f} s") from None
        return {
            "version": self.version,
            "start_s": self.start_s,
            "started_at": self.started_at,
            "swaps_s": self.swaps_s,
            "num_received": self._num_received,
            "text_difference": self.text_difference,
            "pid": os.getpid(),
        }

    @asynccontextmanager
    async def serving(self, checkpoint: Checkpoint) -> AsyncIterator[None]:
        """Hold a checkpoint's weights while a request runs; end this process if the engine dies meanwhile."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with super().serving(checkpoint):
                meters.RUNNING.set(self._num_running, **self.labels)
                yield
        except EngineDeadError:
            logger.exception("the engine died; this replica ends, and Ray starts another")
            os._exit(1)
        finally:
            meters.RUNNING.set(self._num_running, **self.labels)

    async def join(self, init_info: dict[str, Any], timeout_s: float) -> None:
        """Enter a trainer's transfer group, after leaving the one before.

        Args:
            init_info: the group, in the format of vLLM's transfer backend.
            timeout_s: time for the group to form.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        async with self._swap_lock:
            with self._ending_on_failure("joining a transfer group"):
                async with asyncio.timeout(timeout_s):
                    await self.engine.shutdown_weight_transfer_engine()
                    await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def receive(
        self, checkpoint: Checkpoint, sums: Sums, update_info: dict[str, Any], in_flight: bool, timeout_s: float
    ) -> None:
        """Swap to weights that the trainer's group broadcasts, and compare their sums with the trainer's.

        Args:
            checkpoint: the version that the weights have afterwards.
            sums: of the weights in the trainer's memory.
            update_info: the broadcast, in the format of vLLM's transfer backend.
            in_flight: swap without waiting for running requests.
            timeout_s: time for the weights to arrive.

        Raises:
            WeightSyncError: the engine serves other weights than the trainer's.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async def load() -> None:
            async with asyncio.timeout(timeout_s):
                await self.engine.start_weight_update()
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
                await self.engine.finish_weight_update()

        async with self._swap_lock:
            if not in_flight:
                await self._wait_until_idle()
            with self._ending_on_failure(f"receiving {checkpoint.version}"):
                await self._replace(checkpoint, sums, load)
        self._num_received += 1

    async def load(self, checkpoint: Checkpoint) -> None:
        """Swap to a folder's weights and check them, or end this process."""
        with self._ending_on_failure(f"loading {checkpoint.version}"):
            await self.swap(checkpoint)

    async def swap(self, checkpoint: Checkpoint) -> None:
        """Load a folder's weights in place, and compare their sums with the trainer's, or else with the files'.

        Raises:
            WeightSyncError: the engine serves other weights than these.
        """
        if self.spec.weight_transfer is not None:
            await wait_for_folder(checkpoint.path)
        # Fetching, reading and copying take long for large models. In a thread, they leave this replica able to report.
        folder = Path(await asyncio.to_thread(weights_folder, checkpoint))
        sums = await asyncio.to_thread(expected_sums, folder, self.spec.dtype)

        async def load() -> None:
            await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

        await self._replace(checkpoint, sums, load)
        record = read_record(folder)
        if record is not None and record["text"] is not None:
            await self._report_text(record["text"], checkpoint)

    @contextmanager
    def _ending_on_failure(self, action: str) -> Iterator[None]:
        """End this process if the action inside fails; Ray then starts another replica.

        For actions that occupy vLLM's core for long. A failure may leave half of the weights in it, or leave it in a
        broken transfer group.
        """
        self._is_core_busy = True
        try:
            yield
        except WeightSyncError:
            raise  # `_replace` ends the process after a delay, so that the caller learns the reason
        except Exception:
            logger.exception("%s failed; this replica ends, and Ray starts another", action)
            os._exit(1)
        finally:
            self._is_core_busy = False

    async def _replace(self, checkpoint: Checkpoint, sums: Sums, load: Callable[[], Awaitable[None]]) -> None:
        """Swap: pause, load, reset the prefix cache, compare the sums, resume.

        Raises:
            WeightSyncError: the engine is not at these weights; the process is about to end.
        """
        started = time.monotonic()
        is_comparable = await self._weights_are_comparable()
        self.version = f"{LOADING}{checkpoint.version}"
        meters.show_state("swapping", self.labels)
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        await load()
        await self.engine.collective_rpc("pack_tied_heads")
        # The cache holds keys and values of the old weights, and a reload keeps it. Requests that are running read all
        # of their tokens again, with the new weights.
        is_reset = await self.engine.reset_prefix_cache(reset_running_requests=True)
        wrong = None if is_reset else "vLLM has not reset its prefix cache, which holds keys and values of old weights"
        if wrong is None and is_comparable:
            wrong = difference(await self._served_sums(), sums)
        if wrong is not None:
            threading.Timer(EXIT_DELAY_S, os._exit, (1,)).start()
            raise WeightSyncError(f"replica is not at the weights of {checkpoint.version} and is stopped: {wrong}")
        await self.engine.resume_generation()
        self.version = checkpoint.version
        seconds = time.monotonic() - started
        self.swaps_s.append(seconds)
        meters.SWAPS.add(1, **self.labels)
        meters.SWAP_SECONDS.add(seconds, **self.labels)
        self._show_serving()
        logger.info("swapped to %s in %.3f s", checkpoint.version, seconds)

    async def _served_sums(self) -> Sums:
        """Return the sums of the weights that the engine serves, over all of its ranks."""
        return joined(await self.engine.collective_rpc("served_weight_sums"))

    async def _weights_are_comparable(self) -> bool:
        """Tell whether this engine serves the numbers of its files; found out once, before the first swap."""
        if self._is_comparable is None:
            quantization = self.engine.model_config.quantization
            if quantization is not None:
                reason: str | None = f"they are quantised ({quantization})"
            else:
                folder = Path(await asyncio.to_thread(weights_folder, self.spec.checkpoint))
                sums = await asyncio.to_thread(expected_sums, folder, self.spec.dtype)
                reason = difference(await self._served_sums(), sums)
            self._is_comparable = reason is None
            if reason is not None:
                logger.warning(
                    "swaps of this replica are not checked, since its weights cannot be compared: %s", reason
                )
        return self._is_comparable

    async def _report_text(self, text: TextReading, checkpoint: Checkpoint) -> None:
        """Report how far the engine's reading of a text is from the trainer's."""
        self.text_difference = await self._read_text(text, checkpoint)
        if self.text_difference is not None:
            meters.TEXT_DIFFERENCE.set(self.text_difference, **self.labels)
            logger.info(
                "%s reads the text %.2e away from the trainer, on average", checkpoint.version, self.text_difference
            )

    def _show_serving(self) -> None:
        meters.show_state("serving", self.labels)
        meters.show_weights(self.version, self.labels)
