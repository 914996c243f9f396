"""Fleet of replicas of one kind behind one router: calls, weights, and readiness.

A `Fleet` is the callers' side. It takes a lease from the router, calls the replica, and releases the lease with what
became of the call:

* Ray restarts a replica that dies and repeats its calls. Since every request names its weights, a replica that restarts
  or joins swaps to them before it answers.
* A call that outlives its timeout has met a hung replica. It is cancelled and made once more on another replica, and
  the router kills the hung one.

Which replica answers is decided by `rayrl.fleets.router`, where it runs by Ray.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.algorithms.scaling import CALLS_PER_REPLICA, ScaleRule
from rayrl.engines.serving import ReplicaStatus, Serving
from rayrl.engines.start import EngineSpec, environment
from rayrl.errors import FleetError, StageTimeout, WeightSyncError
from rayrl.fleets import actors
from rayrl.fleets.actors import Actor
from rayrl.fleets.replicas import Replicas
from rayrl.fleets.router import LEASE_S, WAIT_S, Lease, Outcome, Router
from rayrl.metrics.fleet_state import FleetState
from rayrl.records import Checkpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_TIMEOUT_S = 600.0
"""Longest wait for a fleet's minimum of ready replicas."""
CALL_TIMEOUT_S = 1800.0
"""Longest wait for an answer of a replica."""
ROUTER_TIMEOUT_S = 60.0
"""Longest wait for an answer of the router, beside the time that it is asked to wait itself. Ray restarts a router that
died within seconds."""
STOP_TIMEOUT_S = 30.0
"""Longest wait for the routers of fleets that are stopped."""
MAX_PART = 256
"""Most items in one call of `map`: a replica that dies loses no more work than that."""
MAX_ATTEMPTS = 2
"""Replicas on which a call is tried, if they hang or are gone for good."""
MAX_CONCURRENCY = 1000
"""Calls that Ray lets into an engine's replica at once; the engine itself batches up to `max_num_seqs` requests."""
ROUTER_CONCURRENCY = 10_000
"""Calls that Ray lets into a router at once: every call that waits for a lease is one."""


class Fleet:
    """Handle of a fleet. It is a value that can be sent to Ray tasks."""

    def __init__(self, name: str, router: Actor):
        self.name = name
        self.router = router

    @property
    def concurrency(self) -> int:
        """Blocks to keep in flight: enough to keep every replica busy, also those that may still join."""
        return CALLS_PER_REPLICA * self._ask("most")

    @property
    def replicas(self) -> list[Actor]:
        """Handles of the ready replicas, once the fleet has its minimum of them."""
        leases = self.hold()
        self.release(leases)
        return [lease.replica for lease in leases]

    def call(self, method: str, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Run a method on the least busy replica and wait for its answer.

        The call counts as many items as its first argument that is a list has.

        Raises:
            StageTimeout: several replicas in turn gave no answer in time, or none was ready.
            FleetError: there is no replica, because none can start, or none survives the call.
        """
        num_items = next((len(argument) for argument in arguments if isinstance(argument, list)), 1)
        failure: Exception = FleetError(self.name)
        for _ in range(MAX_ATTEMPTS):
            lease = self._lease(num_items, timeout_s)
            outcome: Outcome = "unasked"
            answer = getattr(lease.replica, method).remote(*arguments)
            try:
                self._wait([lease], [answer], timeout_s)
                outcome = "answered"  # also when `ray.get` raises what the method raised
                return ray.get(answer, timeout=timeout_s)
            except GetTimeoutError:
                outcome = "hung"
                # Without the cancel, Ray would repeat the call on the process that replaces this one, to no use.
                ray.cancel(answer)
                logger.warning("%s gave no answer to %s within %.0f s", lease.name, method, timeout_s)
                failure = StageTimeout(f"{self.name}: replicas gave no answer to {method} within {timeout_s:.0f} s")
            except RayActorError as error:
                # The replica is gone for good, or Ray has repeated the call as often as `MAX_RETRIES` allows.
                outcome = "suspect"
                logger.warning("%s is gone; %s is tried on another replica", lease.name, method)
                failure = FleetError(f"{self.name}: replicas do not survive {method}; the last one: {error}")
            finally:
                self.release([lease], outcome)
        raise failure

    def map(self, num_items: int, call: Callable[[slice], Iterable[T]]) -> list[T]:
        """Run `call` on slices of `num_items` items, enough at once to keep every replica busy, and join the answers.

        Args:
            num_items: number of items.
            call: takes a slice of the items and returns an answer for each.
        """
        if num_items == 0:
            return []
        concurrency = self.concurrency
        items_per_call = min(MAX_PART, -(-num_items // concurrency))
        parts = [slice(start, start + items_per_call) for start in range(0, num_items, items_per_call)]
        answers: list[T] = []
        with ThreadPoolExecutor(concurrency) as calls:
            for part in calls.map(call, parts):
                answers.extend(part)
        return answers

    def adopt(self, checkpoint: Checkpoint, *, in_flight: bool = False, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Swap every ready replica to a checkpoint's weights, each checked against the sums of the trainer's.

        A replica that is not ready, or joins later, is swapped by the first request that names the checkpoint.

        Args:
            checkpoint: the weights.
            in_flight: swap without waiting for running requests, which then span two versions.
            timeout_s: longest wait for all replicas.

        Raises:
            WeightSyncError: a replica serves another version, or other weights than the trainer's.
            StageTimeout: a replica gave no answer in time.
        """
        leases = self.hold_ready()
        calls = [lease.replica.adopt.remote(checkpoint, in_flight) for lease in leases]
        versions: set[str] = set()
        try:
            self._wait(leases, calls, timeout_s)
            for lease, call in zip(leases, calls, strict=True):
                try:
                    versions.add(ray.get(call, timeout=timeout_s))
                except RayActorError:
                    # The replica that takes its place swaps at its first request. One that is gone must not hide that
                    # another one has wrong weights, so the loop goes on.
                    logger.warning("%s is gone before it took %s", lease.name, checkpoint.version)
        except GetTimeoutError:
            raise StageTimeout(f"{self.name}: a replica took no weights within {timeout_s:.0f} s") from None
        finally:
            self.release(leases)
        stale = versions - {checkpoint.version}
        if stale:
            raise WeightSyncError(f"{self.name}: replicas serve {stale} instead of {checkpoint.version}")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> list[ReplicaStatus]:
        """Wait until the fleet has its minimum of ready replicas, and return the reports of all that are ready then.

        Raises:
            StageTimeout: they were not ready in time; the message gives their number, and what the cluster has free.
            FleetError: a replica cannot start; the message gives the reason.
        """
        leases = self.hold(timeout_s)
        try:
            return self.statuses(leases, timeout_s)
        finally:
            self.release(leases)

    def hold(self, timeout_s: float = START_TIMEOUT_S) -> list[Lease]:
        """Wait as `wait_ready` does, and lease all replicas that are ready then. None of them ends before its release.

        The leases expire unless they are renewed, by `renew` or by a method here that waits for their replicas.
        """
        found: list[Lease] | FleetState = self._ask("ready", timeout_s, wait_s=timeout_s)
        if isinstance(found, list):
            return found
        self._raise_not_ready(found, timeout_s)

    def hold_ready(self) -> list[Lease]:
        """Lease all replicas that are ready now, as `hold` does; there may be none."""
        return self._ask("hold")

    def statuses(self, leases: list[Lease], timeout_s: float = START_TIMEOUT_S) -> list[ReplicaStatus]:
        """Return the report of each of these replicas.

        Raises:
            StageTimeout: a replica gave none in time.
            FleetError: a replica is gone.
        """
        calls = [lease.replica.status.remote() for lease in leases]
        try:
            self._wait(leases, calls, timeout_s)
            return ray.get(calls, timeout=timeout_s)
        except GetTimeoutError:
            raise StageTimeout(f"{self.name}: a replica did not report its status within {timeout_s:.0f} s") from None
        except RayActorError as error:
            raise FleetError(f"{self.name}: a replica ended before it reported its status: {error}") from None

    def renew(self, leases: list[Lease]) -> None:
        """Keep these leases from expiring."""
        self.router.renew.remote([lease.id for lease in leases])

    def release(self, leases: list[Lease], outcome: Outcome = "unasked") -> None:
        """Return these leases to the router, with what became of their calls."""
        for lease in leases:
            self.router.release.remote(lease.id, outcome)

    def stop(self) -> None:
        """End the replicas and the router, and free their resources."""
        stop_fleets([self])

    def _lease(self, num_items: int, timeout_s: float) -> Lease:
        """Lease a replica for a call.

        Behind calls that are being answered, the call waits for its turn however long that takes. While no replica is
        ready, it waits `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = min(WAIT_S, max(0.0, deadline - time.monotonic()))
            answer: Lease | FleetState = self._ask("lease", num_items, wait_s, wait_s=wait_s)
            if isinstance(answer, Lease):
                return answer
            if answer["ready"]:
                deadline = time.monotonic() + timeout_s
            elif answer["has_given_up"] or time.monotonic() >= deadline:
                self._raise_not_ready(answer, timeout_s)

    def _ask(self, method: str, *arguments: object, wait_s: float = 0.0) -> Any:
        """Return the router's answer, for which it may itself wait `wait_s` seconds.

        Raises:
            StageTimeout: the router gives no answer.
            FleetError: the router has ended.
        """
        timeout_s = wait_s + ROUTER_TIMEOUT_S
        call = getattr(self.router, method).remote(*arguments)
        try:
            return ray.get(call, timeout=timeout_s)
        except GetTimeoutError:
            raise StageTimeout(
                f"{self.name}: its router, on the driver's node, has not answered {method} within {timeout_s:.0f} s"
            ) from None
        except RayActorError as error:
            raise FleetError(f"{self.name}: its router has ended, perhaps with its run: {error}") from None

    def _raise_not_ready(self, state: FleetState, waited_s: float) -> NoReturn:
        """Raise the error for a wait that ended without a replica: why none starts, or what the cluster lacks."""
        if state["failure"] is not None:
            raise FleetError(f"{self.name}: a replica cannot start: {state['failure']}")
        free = ray.available_resources()
        raise StageTimeout(
            f"{self.name}: waited {waited_s:.0f} s for {state['least']} engines to start, or for room in one: "
            f"{state['ready']} ready, {state['starting']} starting, {state['waiting']} calls waiting; each takes "
            f"{state['needs']}; free in the cluster now: {free.get('GPU', 0):g} GPU, {free.get('CPU', 0):g} CPU"
        )

    def _wait(self, leases: list[Lease], calls: list[ObjectRef], timeout_s: float) -> None:
        """Wait for the answers to calls, renewing their leases meanwhile.

        Raises:
            GetTimeoutError: an answer is missing after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        pending = list(calls)
        while pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise GetTimeoutError(f"no answer within {timeout_s:.0f} s")
            # A quarter of the lease's time: a renewal may be late or lost without the lease expiring.
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=min(left_s, LEASE_S / 4))
            if pending:
                self.renew(leases)


def stop_fleets(fleets: Iterable[Fleet]) -> None:
    """End the replicas and the routers of fleets, side by side, and free their resources."""
    stopping = [(fleet, fleet.router.stop.remote()) for fleet in fleets]
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for fleet, stopped in stopping:
        try:
            ray.get(stopped, timeout=max(0.0, deadline - time.monotonic()))
        except (RayError, GetTimeoutError) as error:
            logger.warning("%s: its router did not stop (%s); Ray ends the replicas with it", fleet.name, error)
        actors.kill(fleet.router, no_restart=True)


def start_fleet(name: str, engine: type[Serving], spec: EngineSpec) -> Fleet:
    """Start a fleet of engines; returns at once, and the engines come up in the background.

    Args:
        name: name of the fleet; its actors are named after it.
        engine: the replicas' class: `Generator`, `Embedder`, or their simulated counterparts.
        spec: what each engine starts with.
    """
    config = spec.config
    options = {
        "num_cpus": 0 if spec.on_gpu else config.cpus_per_replica,
        "num_gpus": config.num_gpus if spec.on_gpu else 0,
        "max_concurrency": MAX_CONCURRENCY,
        "runtime_env": {"env_vars": environment(config, spec.on_gpu)},
    }
    rule = ScaleRule(least=config.least, most=config.most, queue_s=config.queue_s, idle_s=config.idle_s)
    replicas = Replicas(replica=engine, spec=spec, options=options)
    return start_replicas(name, replicas, config.num_replicas, rule=rule, max_items=config.max_num_seqs)


def start_replicas(
    name: str, replicas: Replicas, num_replicas: int, *, rule: ScaleRule | None = None, max_items: int = 1
) -> Fleet:
    """Start a fleet of any class that is made from a spec and has a method `status`; returns at once.

    Args:
        name: name of the fleet; its actors are named after it.
        replicas: how one replica is started.
        num_replicas: replicas at first; without a rule, always.
        rule: bounds between which the fleet scales itself.
        max_items: prompts, inputs or pairs that a replica works on at once.
    """
    # The router lives and dies with the driver's node, not with a worker node that an autoscaler may take away.
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {
        "name": f"{name}-router",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": ROUTER_CONCURRENCY,
        "scheduling_strategy": on_this_node,
    }
    rule = rule or ScaleRule(least=num_replicas, most=num_replicas)
    router: Actor = actors.start(
        Router, options, name, replicas, num_replicas=num_replicas, rule=rule, max_items=max_items
    )
    router.run.remote()
    return Fleet(name, router)
