"""Circuit breaker of an oracle: tells a failed judge from failed items, and then stops the asking.

A call that failed for the judge's reasons (no key, no credit, no such address) is tried again by one caller, while the
others wait. If that fails too, nothing more is asked. Answers that nobody can read stop the asking once there are
several in a row: one by itself is an item's fault.
"""

import asyncio

from rayrl.errors import JudgeFailed

PROBE_WAITS_S = (1.0, 3.0)
"""Waits before the calls that find out whether the judge has come back."""
_GOES_ON = (
    "Nothing more was asked. What was answered is in the ledger, and what is unasked stays so: mend it, and run the "
    "same command again, which goes on where this one stopped."
)


class Breaker:
    """State of one oracle, for one event loop.

    Args:
        max_unreadable: answers in a row that nobody can read, after which the judge counts as failed.
    """

    def __init__(self, max_unreadable: int) -> None:
        self._max_unreadable = max_unreadable
        self._unreadable: list[int] = []
        self._failure: str | None = None
        self._num_probes = 0
        self._nobody_probes = asyncio.Event()
        self._nobody_probes.set()

    async def pass_through(self) -> None:
        """Wait while another call finds out whether the judge is well.

        Raises:
            JudgeFailed: it is not.
        """
        await self._nobody_probes.wait()
        self.refuse_if_stopped()

    async def failed(self, reason: str, *, is_probe: bool) -> bool:
        """Note that a call failed for the judge's reasons; return whether this caller tries again as the probe.

        Raises:
            JudgeFailed: it was tried often enough.
        """
        self.refuse_if_stopped()
        if not self._nobody_probes.is_set() and not is_probe:
            return False  # another call is finding out
        if self._num_probes == len(PROBE_WAITS_S):
            self.stop(reason)
            self.refuse_if_stopped()
        self._nobody_probes.clear()
        wait_s = PROBE_WAITS_S[self._num_probes]
        self._num_probes += 1
        try:
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self.probed()  # nobody would tell the others that wait
            raise
        return True

    def probed(self) -> None:
        """Note that the probe is over, and did not fail."""
        self._num_probes = 0
        self._nobody_probes.set()

    def read(self) -> None:
        """Note that an answer was read, or an item was declined: the judge does its part."""
        self._unreadable.clear()

    def unreadable(self, attempt: int) -> list[int]:
        """Note that nobody can read an answer. Returns the attempts in a row, once they are too many; else none."""
        self._unreadable.append(attempt)
        if len(self._unreadable) < self._max_unreadable:
            return []
        return self._unreadable

    def stop(self, reason: str) -> None:
        """Ask nothing more. The first reason is the one that is told."""
        self._failure = self._failure or reason
        self._nobody_probes.set()

    def refuse_if_stopped(self) -> None:
        """Refuse a call once the asking has stopped.

        Raises:
            JudgeFailed: it has.
        """
        if self._failure is not None:
            raise JudgeFailed(f"the oracle failed: {self._failure}. {_GOES_ON}")
