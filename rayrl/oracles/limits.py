"""How hard an expert is pressed: a rate limit that spaces requests (or tokens) evenly, so that no minute ever holds
more than its share, and slots for so many calls at once.
"""

import asyncio
import math
from collections import deque


class RateLimit:
    """At most `per_minute` units a minute, evenly spaced; None is no limit. For one event loop."""

    def __init__(self, per_minute: int | None) -> None:
        self._seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._free_at = -math.inf

    async def acquire(self, amount: float = 1.0) -> None:
        """Wait until `amount` units may be used; callers are served in order."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_per_unit
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Add (or with a negative amount give back) units once the true use is known."""
        self._free_at += amount * self._seconds_per_unit


class Slots:
    """So many at once, in order; how many may change while they are used. For one event loop."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.num_used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        return sum(not turn.done() for turn in self._waiting)

    async def __aenter__(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot was given, and is not wanted any more
                await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.num_used -= 1
        self._admit()

    def resize(self, num: int) -> None:
        """Let so many in from now on. Who is in stays."""
        self.num = num
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.num_used < self.num:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_used += 1
                turn.set_result(None)
