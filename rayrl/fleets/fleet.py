"""A fleet: replicas of one kind behind one router. Which replica answers is the router's; everything else is Ray's.

Ray restarts a dead replica and retries its calls; a restarted replica swaps to the weights the retried call names, and
so does one that joins. A call that outlives its timeout has met a hung replica: it is given up, and the router told.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.algorithms.scaling import CALLS_PER_REPLICA, ScaleRule
from rayrl.engines.start import environment
from rayrl.engines.vllm_engine import EngineSpec, ServedEngine
from rayrl.errors import FleetError, StageTimeout, WeightSyncError
from rayrl.fleets.replicas import Replicas
from rayrl.fleets.router import LEASE_S, WAIT_S, Lease, Outcome, Router
from rayrl.metrics.fleet_state import FleetState
from rayrl.records import Checkpoint

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 1800.0
ROUTER_S = 60.0
"""For a router's answer, beside what it is asked to wait for; Ray starts one that died again within seconds."""
STOP_TIMEOUT_S = 30.0
MAX_PART = 256
"""Items of one call to a replica: one that dies loses no more work than that."""
MAX_HUNG = 2
"""Replicas one call may find hung, or gone for good, before it gives up."""


class Fleet:
    """A handle on a fleet's router; travels to Ray tasks as a value."""

    def __init__(self, name: str, router: Any):
        self.name = name
        self.router = router

    @property
    def concurrency(self) -> int:
        """Blocks to keep in flight: two per replica, also of those that may join."""
        return CALLS_PER_REPLICA * self._ask("most")

    @property
    def replicas(self) -> list[Any]:
        """Handles of the replicas that are ready now."""
        leases = self.hold()
        self.release(leases)
        return [lease.replica for lease in leases]

    def call(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Run a method on the least busy replica and wait for its answer. Its size is that of its first list.

        Raises:
            StageTimeout: several replicas in turn gave no answer in time, or none was ready.
            FleetError: there is no replica, because none can start, or none survives the call.
        """
        num_items = next((len(argument) for argument in arguments if isinstance(argument, list)), 1)
        failure: Exception = FleetError(self.name)
        for _ in range(MAX_HUNG):
            lease, outcome = self._lease(num_items, timeout_s), "unasked"
            answer = lease.replica.__getattr__(method).remote(*arguments)
            try:
                self._wait([lease], [answer], timeout_s)
                outcome = "answered"
                return ray.get(answer, timeout=timeout_s)
            except GetTimeoutError:
                outcome = "hung"
                ray.cancel(answer)  # or Ray repeats it, for nobody, on the process that takes this one's place
                logger.warning("%s gave no answer to %s within %.0f s", lease.name, method, timeout_s)
                failure = StageTimeout(f"{self.name}: replicas gave no answer to {method} within {timeout_s:.0f} s")
            except RayActorError as error:  # for good, or as often as Ray repeats a call
                outcome = "suspect"
                logger.warning("%s is gone; another replica is asked to %s", lease.name, method)
                failure = FleetError(f"{self.name}: replicas do not survive {method}; the last one: {error}")
            finally:
                self.release([lease], outcome)
        raise failure

    def map(self, num: int, call: Callable[[slice], list[Any]]) -> list[Any]:
        """The joined answers of calls on parts of `num` items, so many at once that every replica is busy."""
        concurrency = self.concurrency
        size = min(MAX_PART, -(-num // concurrency))
        parts = [slice(start, start + size) for start in range(0, num, size)] if num else []
        with ThreadPoolExecutor(concurrency) as calls:
            return [answer for answers in calls.map(call, parts) for answer in answers]

    def adopt(self, checkpoint: Checkpoint, *, in_flight: bool = False, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Bring every ready replica to a checkpoint's weights, each proved against the trainer's probe.

        With `in_flight` the replicas do not wait for their running requests, which then span two versions. A replica
        that is not ready, or joins later, is brought to the checkpoint by the first request that names it.

        Raises:
            WeightSyncError: a replica serves another version, or does not answer as the trainer does.
            StageTimeout: a replica gave no answer in time.
        """
        leases = self.hold_ready()
        adopted = [lease.replica.adopt.remote(checkpoint, in_flight) for lease in leases]
        versions = set()
        try:
            self._wait(leases, adopted, timeout_s)
            for lease, answer in zip(leases, adopted, strict=True):
                try:
                    versions.add(ray.get(answer, timeout=timeout_s))
                except RayActorError:  # another takes its place, and swaps when it is first asked
                    logger.warning("%s is gone before it took %s", lease.name, checkpoint.version)
        except GetTimeoutError:
            raise StageTimeout(f"{self.name}: a replica took no weights within {timeout_s:.0f} s") from None
        finally:
            self.release(leases)
        if stale := versions - {checkpoint.version}:
            raise WeightSyncError(f"{self.name}: replicas serve {stale} instead of {checkpoint.version}")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> list[dict[str, Any]]:
        """Wait until as many engines are up as there are to be at least; start-up times and versions of all that are.

        Raises:
            StageTimeout: they were not up in time; says how many are, and what the cluster has free.
            FleetError: one cannot start; says why.
        """
        leases = self.hold(timeout_s)
        try:
            return self.statuses(leases, timeout_s)
        finally:
            self.release(leases)

    def hold(self, timeout_s: float = START_TIMEOUT_S) -> list[Lease]:
        """Wait as `wait_ready` does; leases on all that are ready then, none of which ends before its release.

        They run out unless they are renewed, by `renew` or by what waits for their replicas here.
        """
        found = self._ask("ready", timeout_s, wait_s=timeout_s)
        return found if isinstance(found, list) else self._refuse(found, timeout_s)

    def hold_ready(self) -> list[Lease]:
        """Leases on all that are ready now, as those of `hold`; it may be none."""
        return self._ask("hold")

    def statuses(self, leases: list[Lease], timeout_s: float = START_TIMEOUT_S) -> list[dict[str, Any]]:
        """What each of these replicas says of itself.

        Raises:
            StageTimeout: one says nothing.
            FleetError: one is gone.
        """
        statuses = [lease.replica.status.remote() for lease in leases]
        try:
            self._wait(leases, statuses, timeout_s)
            return ray.get(statuses, timeout=timeout_s)
        except GetTimeoutError:
            raise StageTimeout(f"{self.name}: a replica did not say how it is within {timeout_s:.0f} s") from None
        except RayActorError as error:
            raise FleetError(f"{self.name}: a replica ended before it said how it is: {error}") from None

    def renew(self, leases: list[Lease]) -> None:
        """Keep these leases."""
        self.router.renew.remote([lease.id for lease in leases])

    def release(self, leases: list[Lease], outcome: Outcome = "unasked") -> None:
        """Give these leases back, and say what came of them."""
        for lease in leases:
            self.router.release.remote(lease.id, outcome)

    def stop(self) -> None:
        """Release the replicas and what they hold."""
        try:
            ray.get(self.router.stop.remote(), timeout=STOP_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            logger.warning("%s: its router did not stop (%s); Ray ends the replicas with it", self.name, error)
        ray.kill(self.router, no_restart=True)

    def _lease(self, num_items: int, timeout_s: float) -> Lease:
        """A lease. Behind others that are answered it waits for its turn, however long; for a replica, `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = min(WAIT_S, max(0.0, deadline - time.monotonic()))
            answer = self._ask("lease", num_items, wait_s, wait_s=wait_s)
            if isinstance(answer, Lease):
                return answer
            if answer["ready"]:
                deadline = time.monotonic() + timeout_s
            elif answer["has_given_up"] or time.monotonic() >= deadline:
                self._refuse(answer, timeout_s)

    def _ask(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        """The router's answer, which it may take `wait_s` seconds to find.

        Raises:
            StageTimeout: it gives none.
            FleetError: it is gone.
        """
        try:
            return ray.get(self.router.__getattr__(method).remote(*arguments), timeout=wait_s + ROUTER_S)
        except GetTimeoutError:
            raise StageTimeout(
                f"{self.name}: its router, on the driver's node, has not answered {method} within "
                f"{wait_s + ROUTER_S:.0f} s"
            ) from None
        except RayActorError as error:
            raise FleetError(f"{self.name}: its router has ended, perhaps with its run: {error}") from None

    def _refuse(self, state: FleetState, waited_s: float) -> NoReturn:
        """Say what a wait ended without: a replica that starts, resources to start it, or room in one."""
        if state["failure"] is not None:
            raise FleetError(f"{self.name}: a replica cannot start: {state['failure']}")
        free = ray.available_resources()
        raise StageTimeout(
            f"{self.name}: waited {waited_s:.0f} s for {state['least']} engines to start, or for room in one: "
            f"{state['ready']} ready, {state['starting']} starting, {state['waiting']} calls waiting; each takes "
            f"{state['needs']}; free in the cluster now: {free.get('GPU', 0):g} GPU, {free.get('CPU', 0):g} CPU"
        )

    def _wait(self, leases: list[Lease], calls: list[Any], timeout_s: float) -> None:
        """Wait for the answers, and keep the leases meanwhile."""
        deadline = time.monotonic() + timeout_s
        pending = calls
        while pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise GetTimeoutError(f"no answer within {timeout_s:.0f} s")
            pending = ray.wait(pending, num_returns=len(pending), timeout=min(left_s, LEASE_S / 4))[1]
            if pending:
                self.renew(leases)


def start_fleet(name: str, engine: type[ServedEngine], spec: EngineSpec) -> Fleet:
    """Start a fleet; returns at once, the engines come up in the background."""
    config = spec.config
    options = {
        "num_cpus": 0 if spec.on_gpu else config.cpus_per_replica,
        "num_gpus": config.num_gpus if spec.on_gpu else 0,
        "max_concurrency": 1000,
        "runtime_env": {"env_vars": environment(config, spec.on_gpu)},
    }
    rule = ScaleRule(least=config.least, most=config.most, queue_s=config.queue_s, idle_s=config.idle_s)
    replicas = Replicas(replica=engine, spec=spec, options=options)
    return start_replicas(name, replicas, config.num_replicas, rule=rule, max_items=config.max_num_seqs)


def start_replicas(
    name: str, replicas: Replicas, num_replicas: int, *, rule: ScaleRule | None = None, max_items: int = 1
) -> Fleet:
    """Start a fleet of any class that is made from a spec and has a `status`; returns at once.

    Args:
        name: of the fleet; its actors are named after it.
        replicas: how one is made.
        num_replicas: how many there are at first, and for ever if there is no rule.
        rule: between which sizes the fleet scales itself.
        max_items: prompts, inputs or pairs that a replica works on at once.
    """
    driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    router = (
        ray.remote(Router)
        .options(
            name=f"{name}-router",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=10_000,
            scheduling_strategy=driver,
        )
        .remote(
            name,
            replicas,
            num_replicas=num_replicas,
            rule=rule or ScaleRule(least=num_replicas, most=num_replicas),
            max_items=max_items,
        )
    )
    router.run.remote()
    return Fleet(name, router)
