"""The one owner of a fleet: it starts and ends the replicas, and says which of them answers a call.

A plain class, one named Ray actor per fleet, on the driver's node. How many replicas there should be is decided by
`scale_decision`, where they run by Ray. A call takes a lease on a replica, renews it while it waits, and gives it back;
that of a caller that died runs out. Only a replica that answers its health check is leased. What has no room waits
here, not in a replica: one that joins takes its share at once, and one that is to go ends when its own calls are over.
The replicas live no longer than this actor; restarted, it starts new ones.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from rayrl.algorithms.scaling import CALLS_PER_REPLICA, FleetLoad, ScaleRule, scale_decision
from rayrl.fleets.members import Member, Members, Starter
from rayrl.metrics import meters
from rayrl.metrics.fleet_state import FleetState

logger = logging.getLogger(__name__)

STEP_S = 0.1
"""Between two looks at the fleet."""
LEASE_S = 90.0
"""A lease that was not renewed for so long is lost with its caller."""
WAIT_S = 30.0
"""For how long a request for a lease waits at most; its caller then learns the fleet's state, and asks again."""

Outcome = Literal["unasked", "answered", "suspect", "hung"]
"""Of a lease. An answer, whatever it says, shows that the replica is well; a suspect gets no calls before its next
check; one that did not answer in time is killed."""


@dataclass(frozen=True)
class Lease:
    """The right to call a replica."""

    id: str
    name: str
    replica: Any


@dataclass(eq=False)
class _Held:
    member: Member
    num_items: int
    taken_at: float
    renewed_at: float


class Router:
    """Membership and leases of one fleet.

    Args:
        name: of the fleet.
        starter: starts and ends replicas.
        num_replicas: how many to start with.
        rule: between which sizes the fleet scales itself.
        max_items: prompts, inputs or pairs that a replica works on at once; small calls share a replica up to here.
        clock: seconds.
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
        self._configured = self._rule = rule
        self._max_items = max_items
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._waiting: deque[tuple[int, asyncio.Future[Lease | FleetState]]] = deque()
        self._waiting_since: float | None = None
        self._is_stopped = False
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Keep the fleet until it is stopped."""
        said = ""
        while not self._is_stopped:
            try:
                self.step()
            except Exception as error:  # as a name that is not free yet: the next look tries again
                if str(error) != said:
                    logger.exception("%s: a look at the fleet failed", self._name)
                said = str(error)
            await asyncio.sleep(STEP_S)
        self._is_over.set()

    def step(self) -> None:
        """One look: health, lost leases, size, and who may end."""
        now = self._clock()
        for member in self._members:
            self._members.check(member, now)
        for lease_id, held in list(self._held.items()):
            if now - held.renewed_at > LEASE_S:
                logger.warning("the caller of a call to %s is gone", held.member.name)
                self.release(lease_id, "suspect")
        try:
            self._scale(now)
        finally:  # whatever Ray has against a new replica, the others go on
            for member in self._members:
                if member.is_draining and not member.num_calls:
                    self._members.remove(member)
            self._serve()
            self._show()

    async def lease(self, num_items: int = 1, wait_s: float = WAIT_S) -> Lease | FleetState:
        """A lease on the least busy ready replica; the fleet's state if none has room in time, or none can start."""
        turn: asyncio.Future[Lease | FleetState] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_items, turn))
        self._serve()
        try:
            return await asyncio.wait_for(turn, wait_s)
        except TimeoutError:
            with suppress(ValueError):  # `_serve` has dropped it
                self._waiting.remove((num_items, turn))
            return self.state()

    def hold(self) -> list[Lease]:
        """A lease on every ready replica, whatever it works on: for what all of them must do."""
        return [self._lease(member, 0) for member in self._members.staying() if member.is_ready]

    def renew(self, lease_ids: list[str]) -> None:
        """Say that these calls are still waited for."""
        for lease_id in self._held.keys() & set(lease_ids):
            self._held[lease_id].renewed_at = self._clock()

    def release(self, lease_id: str, outcome: Outcome = "unasked") -> None:
        """Give a lease back, and say what came of it; one that was lost already is ignored."""
        held = self._held.pop(lease_id, None)
        if held is None:
            return
        member, now = held.member, self._clock()
        member.num_calls -= 1
        member.num_items -= held.num_items
        member.freed_at = now
        if outcome == "answered":
            member.is_ready, member.seen_at = True, now
        elif outcome == "suspect":
            member.is_ready = False
        elif outcome == "hung" and held.taken_at >= member.down_at:  # by the process that is up now
            self._members.restart(member, "a call got no answer", now)
        self._serve()

    async def ready(self, timeout_s: float) -> list[Lease] | FleetState:
        """Leases on the ready replicas once there are as many as there are to be at least.

        The fleet's state if there are not in time, or once several in a row could not start. Who asked for more by
        hand does not make the run wait for them.
        """
        deadline = self._clock() + timeout_s
        while True:
            state = self.state()
            if state["ready"] >= min(self._rule.least, self._configured.least):
                return self.hold()
            if state["has_given_up"] or self._clock() >= deadline:
                return state
            await asyncio.sleep(STEP_S)

    def resize(self, least: int | None, most: int | None) -> FleetState:
        """Scale between other bounds from now on; None is the configured one."""
        given = {"least": least, "most": most}
        rule = replace(self._configured, **{name: size for name, size in given.items() if size is not None})
        if rule != self._rule:
            logger.info("%s: %d to %d replicas from now on", self._name, rule.least, rule.most)
        self._rule = rule
        return self.state()

    def most(self) -> int:
        """Replicas there may come to be: callers keep enough calls in flight for all of them."""
        return max(self._rule.most, self._configured.most)

    def state(self) -> FleetState:
        """What the fleet is seen to do."""
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
        """End every replica at once, whatever it is doing, and then `run`, which Ray would report as killed."""
        self._is_stopped = True
        for member in self._members:
            self._members.remove(member)
        await self._is_over.wait()

    def _scale(self, now: float) -> None:
        staying = self._members.staying()
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
        if not self._members.num_started:
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

    def _serve(self) -> None:
        """Hand out leases, first come first served, as long as there is room; the bad news if there never will be."""
        while self._waiting:
            num_items, turn = self._waiting[0]
            if not turn.done() and self._members.has_given_up and not self._members.staying():
                turn.set_result(self.state())
            elif not turn.done():
                room = [member for member in self._members.staying() if self._has_room(member)]
                if not room:
                    return
                turn.set_result(self._lease(min(room, key=lambda member: member.num_items), num_items))
                meters.CALLS.add(fleet=self._name)
            self._waiting.popleft()

    def _has_room(self, member: Member) -> bool:
        is_busy = member.num_calls >= CALLS_PER_REPLICA and member.num_items >= self._max_items
        return member.is_ready and not is_busy

    def _lease(self, member: Member, num_items: int) -> Lease:
        lease, now = Lease(uuid.uuid4().hex, member.name, member.replica), self._clock()
        self._held[lease.id] = _Held(member, num_items, taken_at=now, renewed_at=now)
        member.num_calls += 1
        member.num_items += num_items
        return lease
