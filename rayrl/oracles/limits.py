"""Rate limits and slots of an oracle.

A rate limit spaces requests (or tokens) evenly, so that no minute ever holds more than its share. Slots let in a number
of calls at once. Both are for one event loop; neither is shared between processes.
"""

import asyncio
import math
from collections import deque

_MARGIN = 1.0025
"""Spaces units a little wider than a minute's share: timers are late by milliseconds, and not always by as many."""


class RateLimit:
    """At most `per_minute` units a minute, evenly spaced; None is no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._seconds_per_unit = _MARGIN * 60.0 / per_minute if per_minute else 0.0
        self._free_at = -math.inf

    async def acquire(self, amount: float = 1.0) -> None:
        """Wait until `amount` units may be used; callers are served in order."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        # Moved before the wait, so that the next caller queues behind this one.
        self._free_at = start + amount * self._seconds_per_unit
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Charge `amount` more units (or give back, if negative) once the true use is known."""
        self._free_at += amount * self._seconds_per_unit


class Slots:
    """At most `num` callers at once, in the order in which they came; the number may change at any time."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.num_used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        """Callers without a slot. Those that were cancelled are still in the queue, and do not count."""
        return sum(not turn.done() for turn in self._waiting)

    async def __aenter__(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot was given just before the caller went away
                await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.num_used -= 1
        self._admit()

    def resize(self, num: int) -> None:
        """Let in this number of callers from now on. Callers that hold a slot keep it."""
        self.num = num
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.num_used < self.num:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_used += 1
                turn.set_result(None)
