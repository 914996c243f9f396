"""Reward functions of a user: they wait for each other, hang, fail, and are async."""

import asyncio
import threading

TOGETHER = threading.Barrier(4)
RELEASE = threading.Event()
"""Set by the test that has hung enough."""


def meet(prompt: str, response: str) -> float:
    """Return once four calls are under way at the same time."""
    TOGETHER.wait(timeout=30)
    return float(len(response))


def hang_on_slow(prompt: str, response: str) -> float | None:
    """Never return for one response, abstain on an empty one."""
    if response == "slow":
        RELEASE.wait()
    return 1.0 if response else None


async def hang_on_slow_async(prompt: str, response: str) -> float | None:
    """Do the same without a thread."""
    if response == "slow":
        await asyncio.Event().wait()
    return 1.0 if response else None


def fail(prompt: str, response: str) -> float:
    """Raise in a library's frame."""
    return float(asyncio.run(fail_async(prompt, response)))


async def fail_async(prompt: str, response: str) -> float:
    """Raise."""
    raise LookupError(f"no such key: {prompt}")


def leave(prompt: str, response: str) -> float:
    """Try to end the process."""
    raise SystemExit(3)


def speak(prompt: str, response: str) -> str:
    """Return no number."""
    return "good"
