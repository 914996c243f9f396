"""A rate limit: spaces requests (or tokens) evenly, so that no minute ever holds more than its share."""

import asyncio
import math


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
