"""Who is in a fleet, and how each of them is: started, ready, silent, not well, unable to start, ending."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError, RayActorError

logger = logging.getLogger(__name__)

CHECK_S = 5.0
"""Between two health checks of a replica."""
SILENT_S = 15.0
"""A replica that neither answers its health check nor ends a call for so long gets no new calls until it does."""
BACKOFF_S = 30.0
"""After a replica could not start."""
_DEAD = (ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError)
"""For good: Ray restarts what crashes, but nothing whose constructor fails."""


class Starter(Protocol):
    """Starts and ends replicas."""

    @property
    def needs(self) -> str:
        """What each of them takes, for humans."""
        ...

    def start(self, name: str) -> Any: ...
    def restart(self, replica: Any) -> None: ...
    def end(self, name: str, replica: Any) -> None: ...


@dataclass(eq=False)
class Member:
    """A replica, as the router sees it."""

    name: str
    replica: Any
    check: "asyncio.Future[Any] | None"
    """The health check under way."""
    checked_at: float
    """When it began."""
    started_at: float
    freed_at: float
    """When this replica was started, or ended its last call."""
    is_ready: bool = False
    is_draining: bool = False
    num_calls: int = 0
    num_items: int = 0
    """Prompts, inputs or pairs in these calls."""


class Members:
    """The replicas of a fleet. Times are seconds of the caller's clock.

    Args:
        fleet: its name; replica n is `<fleet>-<n>`.
        starter: starts and ends replicas.
    """

    def __init__(self, fleet: str, starter: Starter):
        self.num_started = 0
        self.failure: str | None = None
        """Why the last replica that could not start did not; None once one that was started later is ready."""
        self.starter = starter
        self._fleet = fleet
        self._members: list[Member] = []
        self._failed_at: float | None = None

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members))

    def staying(self) -> list[Member]:
        """Those that do not drain."""
        return [member for member in self._members if not member.is_draining]

    def start(self, num: int, now: float) -> None:
        """Start so many more, unless one could not start a moment ago."""
        if self._failed_at is not None and now - self._failed_at < BACKOFF_S:
            return
        for _ in range(num):
            name = f"{self._fleet}-{self.num_started}"
            replica = self.starter.start(name)
            check = asyncio.ensure_future(replica.status.remote())
            self.num_started += 1
            self._members.append(Member(name, replica, check, checked_at=now, started_at=now, freed_at=now))

    def drain(self, num: int) -> None:
        """Let so many go: first who is not ready, then who has fewest calls, then who has been idle for longest."""
        staying = sorted(self.staying(), key=lambda member: (member.is_ready, member.num_calls, member.freed_at))
        for member in staying[:num]:
            logger.info("%s ends when its %d calls are over", member.name, member.num_calls)
            member.is_draining = True

    def remove(self, member: Member) -> None:
        """End a replica at once."""
        self._members.remove(member)
        if member.check is not None:
            member.check.cancel()
        self.starter.end(member.name, member.replica)

    def check(self, member: Member, now: float) -> None:
        """Read a replica's health check, and begin the next one when it is time."""
        if member.check is None:
            if now - member.checked_at >= CHECK_S:
                member.check, member.checked_at = asyncio.ensure_future(member.replica.status.remote()), now
        elif member.check.done():
            error, member.check = member.check.exception(), None
            if error is None:
                self._is_well(member)
            else:
                self._is_not_well(member, error, now)
        elif now - max(member.checked_at, member.freed_at) > SILENT_S:
            member.is_ready = False

    def _is_well(self, member: Member) -> None:
        if not member.is_ready:
            logger.info("%s is ready", member.name)
            member.is_ready = True
            if self._failed_at is not None and member.started_at > self._failed_at:
                self.failure = self._failed_at = None

    def _is_not_well(self, member: Member, error: BaseException, now: float) -> None:
        member.is_ready = False
        if isinstance(error, _DEAD):
            logger.warning("%s could not start: %s", member.name, error)
            self.failure, self._failed_at = str(error), now
            self.remove(member)
        elif not isinstance(error, RayActorError):  # it lives, and says that something is wrong
            logger.warning("%s is restarted: %s", member.name, error)
            self.starter.restart(member.replica)
