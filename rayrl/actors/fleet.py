"""A fleet: replicas of one kind behind one router. Which replica answers is decided here; everything else is Ray's.

Ray restarts a dead replica and retries its calls; a restarted replica swaps to the weights the retried call names. A
call that outlives its timeout has met a hung replica: it is killed, and Ray does the rest.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rayrl.actors.engine import EngineSpec, ServedEngine, environment
from rayrl.errors import StageTimeout, WeightSyncError
from rayrl.records import Checkpoint
from rayrl.telemetry import meters

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 1800.0
MAX_PART = 256
"""Items of one call to a replica: one that dies loses no more work than that."""
MAX_RETRIES = 5
"""Replicas one call may lose; a call that kills every replica it meets must end."""
MAX_HUNG = 2
"""Replicas one call may find hung before it gives up."""


class Router:
    """Hands out the replica with the fewest calls in flight. A Ray actor's plain class, one per fleet."""

    def __init__(self, fleet: str, num_replicas: int):
        self._fleet = fleet
        self._in_flight = [0] * num_replicas
        meters.FLEET_REPLICAS.set(num_replicas, fleet=fleet)
        meters.QUEUE_DEPTH.set(0, fleet=fleet)

    def lease(self) -> int:
        replica = min(range(len(self._in_flight)), key=self._in_flight.__getitem__)
        self._in_flight[replica] += 1
        meters.CALLS.add(fleet=self._fleet)
        meters.QUEUE_DEPTH.set(sum(self._in_flight), fleet=self._fleet)
        return replica

    def release(self, replica: int) -> None:
        self._in_flight[replica] -= 1
        meters.QUEUE_DEPTH.set(sum(self._in_flight), fleet=self._fleet)


class Fleet:
    """Actor handles of the replicas and their router; travels to Ray tasks as a value."""

    def __init__(self, name: str, replicas: list[Any], router: Any):
        self.name = name
        self.replicas = replicas
        self.router = router

    @property
    def concurrency(self) -> int:
        """Blocks to keep in flight: two per replica, so that an engine never waits for the next block."""
        return 2 * len(self.replicas)

    def call(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Run a method on the least busy replica and wait for its answer.

        Raises:
            StageTimeout: several replicas in turn gave no answer in time.
        """
        for _ in range(MAX_HUNG):
            index: Any = ray.get(self.router.lease.remote())
            replica = self.replicas[index]
            try:
                return ray.get(replica.__getattr__(method).remote(*arguments), timeout=timeout_s)
            except GetTimeoutError:
                logger.warning("%s: replica %d hung in %s for %.0f s; killing it", self.name, index, method, timeout_s)
                meters.HUNG.add(fleet=self.name)
                ray.kill(replica, no_restart=False)
            finally:
                self.router.release.remote(index)
        raise StageTimeout(f"{self.name}: {MAX_HUNG} replicas gave no answer to {method} within {timeout_s:.0f} s")

    def map(self, num: int, call: Callable[[slice], list[Any]]) -> list[Any]:
        """The joined answers of calls on parts of `num` items, so many at once that every replica is busy."""
        size = min(MAX_PART, -(-num // self.concurrency))
        parts = [slice(start, start + size) for start in range(0, num, size)] if num else []
        with ThreadPoolExecutor(self.concurrency) as calls:
            return [answer for answers in calls.map(call, parts) for answer in answers]

    def adopt(self, checkpoint: Checkpoint, *, in_flight: bool = False, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Bring every replica to a checkpoint's weights, each proved against the trainer's probe.

        With `in_flight` the replicas do not wait for their running requests, which then span two versions.

        Raises:
            WeightSyncError: a replica serves another version.
            StageTimeout: a replica gave no answer in time.
        """
        try:
            adopted = [replica.adopt.remote(checkpoint, in_flight) for replica in self.replicas]
            versions = ray.get(adopted, timeout=timeout_s)
        except GetTimeoutError:
            raise StageTimeout(f"{self.name}: a replica took no weights within {timeout_s:.0f} s") from None
        stale = {version for version in versions if version != checkpoint.version}
        if stale:
            raise WeightSyncError(f"{self.name}: replicas serve {stale} instead of {checkpoint.version}")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> list[dict[str, Any]]:
        """Wait until every engine is up; their start-up times and versions."""
        try:
            return ray.get([replica.status.remote() for replica in self.replicas], timeout=timeout_s)
        except GetTimeoutError:
            present = ray.available_resources()
            raise StageTimeout(
                f"{self.name}: waited {timeout_s:.0f} s for {len(self.replicas)} engines to start; "
                f"free in the cluster now: {present.get('GPU', 0):g} GPU, {present.get('CPU', 0):g} CPU"
            ) from None

    def stop(self) -> None:
        """Release the replicas and what they hold."""
        for actor in [*self.replicas, self.router]:
            ray.kill(actor, no_restart=True)


def start_fleet(name: str, engine: type[ServedEngine], spec: EngineSpec) -> Fleet:
    """Start a fleet; returns at once, the engines come up in the background."""
    gpus = spec.config.gpus_per_replica * spec.config.tensor_parallel_size if spec.on_gpu else 0
    options = {
        "num_gpus": gpus,
        "max_concurrency": 1000,
        "runtime_env": {"env_vars": environment(spec.config, spec.on_gpu)},
    }
    return start_replicas(name, engine, spec, num_replicas=spec.config.num_replicas, options=options)


def start_replicas(name: str, replica: type[Any], spec: Any, *, num_replicas: int, options: dict[str, Any]) -> Fleet:
    """Start a fleet of any class that is made from a spec and has a `status`; returns at once.

    Args:
        name: of the fleet; its actors are named after it.
        replica: the actors' plain class.
        spec: what each of them is made from.
        num_replicas: how many there are.
        options: Ray's, beside those that make a replica restart and its calls be retried.
    """
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": MAX_RETRIES} | options
    replicas = [ray.remote(replica).options(name=f"{name}-{i}", **options).remote(spec) for i in range(num_replicas)]
    router = ray.remote(Router).options(name=f"{name}-router", num_cpus=0, max_restarts=-1).remote(name, num_replicas)
    return Fleet(name, replicas, router)
