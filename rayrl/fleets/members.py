"""Members of a fleet: the replicas that a router keeps, and the health of each.

A member is starting, ready, silent, hung, not well, unable to start, or draining; `Members.check` moves it between
these states by its health checks. How many members there are is the router's decision, and a `Starter` starts and ends
their processes. So everything here can be tested without Ray and by any clock.
"""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ray.exceptions import ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError, RayActorError

from rayrl.fleets.actors import Actor
from rayrl.metrics import meters

logger = logging.getLogger(__name__)

CHECK_S = 5.0
"""Time between two health checks of a replica."""
SILENT_S = 15.0
"""A replica that for so long answers no health check and ends no call is silent: it gets no new calls until it does."""
HUNG_S = 120.0
"""A replica that is silent for so long while its process is up is hung: it is killed, and Ray starts another process
and repeats the calls."""
BACKOFF_S = 15.0
"""Time without new starts after a replica could not start."""
MAX_FAILURES = 3
"""Failed starts in a row after which waiting callers get an error: the fleet cannot start."""
_DEAD_FOR_GOOD = (ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError)
"""Ray restarts a process that crashes, but not an actor whose constructor fails."""


class Starter(Protocol):
    """Starts and ends the processes of replicas."""

    @property
    def needs(self) -> str:
        """Resources that each replica takes, for messages."""
        ...

    def clear(self, fleet: str) -> None:
        """Free what an earlier router of this fleet left behind."""
        ...

    def start(self, name: str) -> Actor:
        """Start a replica; returns at once."""
        ...

    def is_up(self, replica: Actor) -> bool:
        """Tell whether the replica's process has started and has not ended."""
        ...

    def restart(self, replica: Actor) -> None:
        """Kill the replica's process; another one takes its place."""
        ...

    def end(self, name: str, replica: Actor) -> None:
        """End a replica for good."""
        ...


@dataclass(eq=False)
class Member:
    """A replica as the router sees it. Times are seconds of the router's clock."""

    name: str
    replica: Actor
    check: "asyncio.Future[object] | None"
    """The health check that is under way."""
    started_at: float
    seen_at: float
    """Last sign of life: when it answered a call, when its check began, or when its process was not up yet."""
    down_at: float
    """When its process was last not up, or was killed."""
    freed_at: float
    """When it was started, or its last call ended."""
    is_ready: bool = False
    is_draining: bool = False
    num_calls: int = 0
    num_items: int = 0
    """Prompts, inputs or pairs in these calls."""


class Members:
    """All replicas of a fleet.

    Args:
        fleet: name of the fleet; its replica n is called `<fleet>-<n>`.
        starter: starts and ends replicas.
    """

    def __init__(self, fleet: str, starter: Starter):
        self.num_started = 0
        self.failure: str | None = None
        """Reason of the last failed start; None again once a replica that was started later is ready."""
        self.starter = starter
        self._fleet = fleet
        self._members: list[Member] = []
        self._failed_at: float | None = None
        self._num_failures = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members))  # a copy: callers remove members while they iterate

    def staying(self) -> list[Member]:
        """Return the members that do not drain."""
        return [member for member in self._members if not member.is_draining]

    @property
    def has_given_up(self) -> bool:
        """Return whether the last `MAX_FAILURES` starts failed and none is under way; starts go on after each wait."""
        return self._num_failures >= MAX_FAILURES and all(member.is_ready for member in self.staying())

    def start(self, num: int, now: float) -> None:
        """Start `num` more replicas, unless a start has failed within the last `BACKOFF_S`."""
        if self._failed_at is not None and now - self._failed_at < BACKOFF_S:
            return
        if self.num_started == 0:
            self.starter.clear(self._fleet)
        for _ in range(num):
            name = f"{self._fleet}-{self.num_started}"
            replica = self.starter.start(name)
            # The first check waits inside Ray until the process is up, and so tells when the replica is ready.
            check = asyncio.ensure_future(replica.status.remote())
            self.num_started += 1
            self._members.append(Member(name, replica, check, started_at=now, seen_at=now, down_at=now, freed_at=now))

    def drain(self, num: int) -> None:
        """Give `num` replicas no new calls; each is removed when its own calls are over.

        Replicas that are not ready go first, then those with the fewest calls, then those that have been idle longest.
        """
        order = sorted(self.staying(), key=lambda member: (member.is_ready, member.num_calls, member.freed_at))
        for member in order[:num]:
            logger.info("%s ends when its %d calls are over", member.name, member.num_calls)
            member.is_draining = True

    def remove(self, member: Member) -> None:
        """End a replica at once."""
        self._members.remove(member)
        if member.check is not None:
            member.check.cancel()
        self.starter.end(member.name, member.replica)

    def restart(self, member: Member, reason: str, now: float) -> None:
        """Kill a replica's process; Ray starts another in its place."""
        # `down_at` also makes later reports of hung calls harmless: their leases are older than the new process.
        logger.warning("%s is restarted: %s", member.name, reason)
        meters.HUNG.add(fleet=self._fleet)
        member.is_ready = False
        member.seen_at = member.down_at = now
        self.starter.restart(member.replica)

    def check(self, member: Member, now: float) -> None:
        """Act on a replica's health check, and begin the next one when it is due.

        Silence counts only while the process is up: a check also waits while Ray starts a process, or starts it again
        after a crash, and that may take any time.
        """
        is_up = self.starter.is_up(member.replica)
        if not is_up:
            member.is_ready = False
            member.seen_at = member.down_at = now
        if member.check is None:
            # Of a process that is down, the next check begins at once: its answer tells when the process is up again.
            if not is_up or now - member.seen_at >= CHECK_S:
                member.check = asyncio.ensure_future(member.replica.status.remote())
                member.seen_at = now
        elif member.check.done():
            error = member.check.exception()
            member.check = None
            if error is None:
                self._mark_well(member)
            else:
                self._mark_failed(member, error, now)
        elif now - member.seen_at > HUNG_S:
            self.restart(member, f"no answer to its health check for {HUNG_S:.0f} s", now)
        elif now - member.seen_at > SILENT_S:
            member.is_ready = False

    def _mark_well(self, member: Member) -> None:
        if member.is_ready:
            return
        logger.info("%s is ready", member.name)
        member.is_ready = True
        # Only a replica started after the failure shows that starts work again.
        if self._failed_at is not None and member.started_at > self._failed_at:
            self.failure, self._failed_at, self._num_failures = None, None, 0

    def _mark_failed(self, member: Member, error: BaseException, now: float) -> None:
        member.is_ready = False
        if isinstance(error, _DEAD_FOR_GOOD):
            logger.warning("%s could not start: %s", member.name, error)
            # Replicas that were started together fail for the same reason and count as one failure.
            if self._failed_at is None or member.started_at > self._failed_at:
                self._num_failures += 1
            self.failure, self._failed_at = str(error), now
            self.remove(member)
        elif not isinstance(error, RayActorError):
            # The replica is alive and reports that something is wrong. After a `RayActorError` Ray restarts it anyway.
            self.restart(member, str(error), now)
