"""Router of a fleet: starts and ends its replicas, and leases them to callers.

A plain class, run as one named Ray actor per fleet on the driver's node.

* A caller takes a lease on a replica, calls the replica itself, renews the lease while it waits, and releases it. The
  lease of a caller that died expires.
* Only replicas that answer their health checks are leased. Calls for which no replica has room wait in this actor and
  not in a replica. So a replica that joins takes its share at once, and a replica that leaves ends as soon as its own
  calls are over.
* `scale_decision` decides how many replicas there should be. Ray decides where they run.
* The replicas end with this actor. If Ray restarts it, it starts new ones.

Answers do not pass through the router, and it does not know which weights a replica holds.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from rayrl.algorithms.scaling import CALLS_PER_REPLICA, FleetLoad, ScaleRule, scale_decision
from rayrl.fleets.actors import Actor
from rayrl.fleets.members import Member, Members, Starter
from rayrl.metrics import meters
from rayrl.metrics.fleet_state import FleetState

logger = logging.getLogger(__name__)

STEP_S = 0.1
"""Time between two steps of the router."""
LEASE_S = 90.0
"""Time after which a lease expires unless it is renewed."""
WAIT_S = 30.0
"""Longest wait for a lease. After it the caller gets the fleet's state, and decides whether to ask again."""

Outcome = Literal["unasked", "answered", "suspect", "hung"]
"""Outcome of a lease, given when it is released.

unasked: the replica was not called. answered: it gave an answer, even an error, so it is well. suspect: it gets no
calls before its next health check. hung: it did not answer in time and is killed.
"""


@dataclass(frozen=True)
class Lease:
    """The right to call a replica."""

    id: str
    name: str
    """Name of the replica."""
    replica: Actor


@dataclass(eq=False)
class _HeldLease:
    member: Member
    num_items: int
    taken_at: float
    renewed_at: float


@dataclass(eq=False)
class _WaitingCall:
    num_items: int
    turn: "asyncio.Future[Lease | FleetState]"


class Router:
    """Membership and leases of one fleet.

    Args:
        name: name of the fleet.
        starter: starts and ends replicas.
        num_replicas: replicas to start with.
        rule: bounds between which the fleet scales itself.
        max_items: prompts, inputs or pairs that a replica works on at once; small calls share a replica up to here.
        clock: returns seconds.
    """

    def __init__(
        self,
        name: str,
        starter: Starter,
        *,
        num_replicas: int,
        rule: ScaleRule,
        max_items: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name = name
        self._members = Members(name, starter)
        self._num_replicas = num_replicas
        self._configured_rule = rule
        self._rule = rule
        self._max_items = max_items
        self._clock = clock
        self._held: dict[str, _HeldLease] = {}
        self._waiting: deque[_WaitingCall] = deque()
        self._waiting_since: float | None = None
        self._is_stopped = False
        self._has_ended = asyncio.Event()

    async def run(self) -> None:
        """Keep the fleet until it is stopped: one step every `STEP_S`."""
        last_error = ""
        while not self._is_stopped:
            try:
                self.step()
            except Exception as error:
                # For example, Ray may not have freed a replica's name yet. The next step tries again. The same error
                # ten times a second is logged once.
                if str(error) != last_error:
                    logger.exception("%s: a step of the router failed", self._name)
                last_error = str(error)
            await asyncio.sleep(STEP_S)
        self._has_ended.set()

    def step(self) -> None:
        """Check health, expire leases, scale, remove drained replicas, and serve waiting calls."""
        now = self._clock()
        # Health first: what is decided below depends on which replicas are ready and which are gone.
        for member in self._members:
            self._members.check(member, now)
        for lease_id, held in list(self._held.items()):
            if now - held.renewed_at > LEASE_S:
                logger.warning("the lease of a call to %s has expired: its caller is gone", held.member.name)
                self.release(lease_id, "suspect")
        try:
            self._scale(now)
        finally:  # if Ray refuses a new replica, the others continue
            for member in self._members:
                if member.is_draining and not member.num_calls:
                    self._members.remove(member)
            self._serve_waiting()
            self._show()

    async def lease(self, num_items: int = 1, wait_s: float = WAIT_S) -> Lease | FleetState:
        """Wait for a replica with room and lease it. Return the fleet's state instead if there is none in time.

        Args:
            num_items: prompts, inputs or pairs in the call.
            wait_s: longest wait.
        """
        call = _WaitingCall(num_items, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._serve_waiting()
        try:
            return await asyncio.wait_for(call.turn, wait_s)
        except TimeoutError:
            with suppress(ValueError):  # `_serve_waiting` may have dropped it already
                self._waiting.remove(call)
            return self.state()

    def hold(self) -> list[Lease]:
        """Lease every ready replica, however busy it is: for what all of them must do."""
        # With 0 items, these leases take no room from calls, but keep their replicas from ending.
        return [self._lease(member, 0) for member in self._members.staying() if member.is_ready]

    def renew(self, lease_ids: list[str]) -> None:
        """Renew these leases; unknown ones are ignored."""
        for lease_id in self._held.keys() & set(lease_ids):
            self._held[lease_id].renewed_at = self._clock()

    def release(self, lease_id: str, outcome: Outcome = "unasked") -> None:
        """Take a lease back with its outcome. A lease that has expired is ignored."""
        held = self._held.pop(lease_id, None)
        if held is None:
            return
        member, now = held.member, self._clock()
        member.num_calls -= 1
        member.num_items -= held.num_items
        member.freed_at = now
        if outcome == "answered":
            # A busy replica may be slow to answer its health check. An ended call shows the same.
            member.is_ready, member.seen_at = True, now
        elif outcome == "suspect":
            member.is_ready = False
        elif outcome == "hung" and held.taken_at >= member.down_at:
            # A lease older than `down_at` was on a process that is gone already: the one that is up now may be well.
            self._members.restart(member, "a call got no answer", now)
        self._serve_waiting()

    async def ready(self, timeout_s: float) -> list[Lease] | FleetState:
        """Wait until the fleet has its minimum of ready replicas, and lease all that are ready then.

        An operator who raises the minimum above the configured one does not make the run wait for the difference.

        Returns:
            The leases; the fleet's state if the time is over, or once several starts in a row have failed.
        """
        deadline = self._clock() + timeout_s
        while True:
            state = self.state()
            if state["ready"] >= min(self._rule.least, self._configured_rule.least):
                return self.hold()
            if state["has_given_up"] or self._clock() >= deadline:
                return state
            await asyncio.sleep(STEP_S)  # only a step changes what is ready

    def resize(self, least: int | None, most: int | None) -> FleetState:
        """Scale between other bounds from now on; None restores the configured bound."""
        rule = self._configured_rule
        if least is not None:
            rule = replace(rule, least=least)
        if most is not None:
            rule = replace(rule, most=most)
        if rule != self._rule:  # the driver repeats sizes every few seconds
            logger.info("%s: %d to %d replicas from now on", self._name, rule.least, rule.most)
        self._rule = rule
        return self.state()

    def most(self) -> int:
        """Return the most replicas there may come to be: callers keep enough calls in flight for all of them."""
        return max(self._rule.most, self._configured_rule.most)

    def state(self) -> FleetState:
        """Return the state of the fleet, for operators and for callers that wait."""
        staying = self._members.staying()
        num_ready = sum(member.is_ready for member in staying)
        return FleetState(
            name=self._name,
            ready=num_ready,
            starting=len(staying) - num_ready,
            draining=sum(member.is_draining for member in self._members),
            calls=len(self._held),
            waiting=len(self._waiting),
            least=self._rule.least,
            most=self._rule.most,
            needs=self._members.starter.needs,
            failure=self._members.failure,
            has_given_up=self._members.has_given_up,
        )

    async def stop(self) -> None:
        """End every replica at once, whatever it is doing, and return when `run` has ended.

        `run` ends by itself: Ray would report it as failed if this actor were killed while it runs.
        """
        self._is_stopped = True
        for member in self._members:
            self._members.remove(member)
        await self._has_ended.wait()

    def _scale(self, now: float) -> None:
        staying = self._members.staying()
        # The queue counts once it holds enough calls to keep one more replica busy.
        if len(self._waiting) < CALLS_PER_REPLICA:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        load = FleetLoad(
            num_replicas=len(staying),
            num_starting=sum(not member.is_ready for member in staying),
            num_waiting=len(self._waiting),
            waiting_s=0.0 if self._waiting_since is None else now - self._waiting_since,
            idle_s=tuple(now - member.freed_at for member in staying if not member.num_calls),
        )
        change = scale_decision(load, self._rule)
        if self._members.num_started == 0:
            # The first start brings the configured number, within bounds that an operator may have given before.
            change = max(self._rule.least, min(self._num_replicas, self._rule.most))
        if change > 0:
            self._members.start(change, now)
        elif change < 0:
            self._members.drain(-change)

    def _show(self) -> None:
        state = self.state()
        for name, num in (("ready", state["ready"]), ("starting", state["starting"]), ("draining", state["draining"])):
            meters.FLEET_REPLICAS.set(num, fleet=self._name, state=name)
        meters.QUEUE_DEPTH.set(state["waiting"], fleet=self._name)

    def _serve_waiting(self) -> None:
        """Give leases to the waiting calls, first come, first served, until no replica has room.

        If the fleet has given up and has no replica left, the waiting calls get its state instead.
        """
        while self._waiting:
            call = self._waiting[0]
            if call.turn.done():  # the caller's wait was over, or was cancelled
                self._waiting.popleft()
                continue
            staying = self._members.staying()
            if self._members.has_given_up and not staying:
                call.turn.set_result(self.state())
                self._waiting.popleft()
                continue
            with_room = [member for member in staying if self._has_room(member)]
            if not with_room:
                return
            least_busy = min(with_room, key=lambda member: member.num_items)
            call.turn.set_result(self._lease(least_busy, call.num_items))
            meters.CALLS.add(fleet=self._name)
            self._waiting.popleft()

    def _has_room(self, member: Member) -> bool:
        is_full = member.num_calls >= CALLS_PER_REPLICA and member.num_items >= self._max_items
        return member.is_ready and not is_full

    def _lease(self, member: Member, num_items: int) -> Lease:
        lease, now = Lease(uuid.uuid4().hex, member.name, member.replica), self._clock()
        self._held[lease.id] = _HeldLease(member, num_items, taken_at=now, renewed_at=now)
        member.num_calls += 1
        member.num_items += num_items
        return lease
