"""Who is in a fleet, and how each of them is: starting, ready, silent, hung, not well, unable to start, ending."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError, RayActorError

from rayrl.metrics import meters

logger = logging.getLogger(__name__)

CHECK_S = 5.0
"""Between two health checks of a replica."""
SILENT_S = 15.0
"""A replica that neither answers its health check nor ends a call for so long gets no new calls until it does."""
HUNG_S = 120.0
"""One that is silent for so long, though its process is up, is killed: Ray starts another and repeats its calls."""
BACKOFF_S = 15.0
"""After a replica could not start."""
MAX_FAILURES = 3
"""Starts in a row that may fail before nobody waits for the next."""
_DEAD = (ActorDiedError, ActorPlacementGroupRemoved, ActorUnschedulableError)
"""For good: Ray restarts what crashes, but nothing whose constructor fails."""


class Starter(Protocol):
    """Starts and ends replicas."""

    @property
    def needs(self) -> str:
        """What each of them takes, for humans."""
        ...

    def clear(self, fleet: str) -> None:
        """Free what an earlier router of this fleet has left behind."""
        ...

    def start(self, name: str) -> Any: ...

    def is_up(self, replica: Any) -> bool:
        """Whether its process has started, and has not ended."""
        ...

    def restart(self, replica: Any) -> None: ...
    def end(self, name: str, replica: Any) -> None: ...


@dataclass(eq=False)
class Member:
    """A replica, as the router sees it."""

    name: str
    replica: Any
    check: "asyncio.Future[Any] | None"
    """The health check under way."""
    started_at: float
    seen_at: float
    """When it last answered a call, its check began, or it was not up."""
    down_at: float
    """When it was last not up, or killed."""
    freed_at: float
    """When this replica was started, or its last call ended."""
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
        self._num_failures = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members))

    def staying(self) -> list[Member]:
        """Those that do not drain."""
        return [member for member in self._members if not member.is_draining]

    @property
    def has_given_up(self) -> bool:
        """Whether several starts in a row have failed, and nothing is starting now. It is tried again all the same."""
        return self._num_failures >= MAX_FAILURES and all(member.is_ready for member in self.staying())

    def start(self, num: int, now: float) -> None:
        """Start so many more, unless one could not start a moment ago."""
        if self._failed_at is not None and now - self._failed_at < BACKOFF_S:
            return
        if not self.num_started:
            self.starter.clear(self._fleet)
        for _ in range(num):
            name = f"{self._fleet}-{self.num_started}"
            replica = self.starter.start(name)
            check = asyncio.ensure_future(replica.status.remote())
            self.num_started += 1
            self._members.append(Member(name, replica, check, started_at=now, seen_at=now, down_at=now, freed_at=now))

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

    def restart(self, member: Member, why: str, now: float) -> None:
        """Kill a replica; Ray starts another in its place."""
        logger.warning("%s is restarted: %s", member.name, why)
        meters.HUNG.add(fleet=self._fleet)
        member.is_ready = False
        member.seen_at = member.down_at = now
        self.starter.restart(member.replica)

    def check(self, member: Member, now: float) -> None:
        """Read a replica's health check, and begin the next one when it is time.

        A check waits while Ray starts a replica, or starts it again, for however long that takes: only the silence of
        one that is up says anything.
        """
        is_up = self.starter.is_up(member.replica)
        if not is_up:
            member.is_ready = False
            member.seen_at = member.down_at = now
        if member.check is None:
            if not is_up or now - member.seen_at >= CHECK_S:
                member.check, member.seen_at = asyncio.ensure_future(member.replica.status.remote()), now
        elif member.check.done():
            error, member.check = member.check.exception(), None
            if error is None:
                self._is_well(member)
            else:
                self._is_not_well(member, error, now)
        elif now - member.seen_at > HUNG_S:
            self.restart(member, f"it has not said how it is for {HUNG_S:.0f} s", now)
        elif now - member.seen_at > SILENT_S:
            member.is_ready = False

    def _is_well(self, member: Member) -> None:
        if not member.is_ready:
            logger.info("%s is ready", member.name)
            member.is_ready = True
            if self._failed_at is not None and member.started_at > self._failed_at:
                self.failure, self._failed_at, self._num_failures = None, None, 0

    def _is_not_well(self, member: Member, error: BaseException, now: float) -> None:
        member.is_ready = False
        if isinstance(error, _DEAD):
            logger.warning("%s could not start: %s", member.name, error)
            if self._failed_at is None or member.started_at > self._failed_at:  # what was started at once fails as one
                self._num_failures += 1
            self.failure, self._failed_at = str(error), now
            self.remove(member)
        elif not isinstance(error, RayActorError):  # it lives, and says that something is wrong
            self.restart(member, str(error), now)
