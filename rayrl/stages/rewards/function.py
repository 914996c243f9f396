"""A Python function of the user's as the reward of PPO.

Calls run side by side in threads, which is enough for functions that wait for a server. CPU-bound Python gains nothing
from threads: such a function can hand its work to a pool of processes of its own.
"""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rayrl.errors import RewardFailed
from rayrl.fleets.services import Services
from rayrl.models.served_reward import Reasons
from rayrl.oracles.scripted import load_function, own_traceback, shown_texts, source_of, told_as_errors
from rayrl.records import Scored, content_id

SETTING = "ppo.function"


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A function of (prompt, response), plain or async, that returns a number; None abstains."""

    path: str
    """"module:function"."""
    timeout_s: float
    """Longest wait for one call, from its start."""
    concurrency: int
    """Calls at once."""

    @property
    def key(self) -> str:
        """Content of the function's module: an edited function is another reward."""
        return content_id(self.path, source_of(self.path, SETTING))

    @property
    def value_start(self) -> None:
        """The value function starts from M1."""
        return None

    def serve(self, services: Services) -> "FunctionReward":
        """Return itself: it needs no engine."""
        del services
        return self

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Call the function on each response; a call that runs out of time abstains.

        Raises:
            RewardFailed: the function raised, or returned something else than a number or None.
        """
        function = load_function(self.path, SETTING)
        # In a thread of its own: the caller may be inside an event loop, as a notebook is.
        with ThreadPoolExecutor(1) as thread:
            values, timed_out = thread.submit(asyncio.run, self._call_all(function, items)).result()
        if reasons is not None:
            reasons |= dict.fromkeys(timed_out, "timed_out")
        return values

    async def _call_all(
        self, function: Callable[..., object], items: list[Scored]
    ) -> tuple[list[float | None], list[int]]:
        """Return the values in order, and the numbers of the items whose calls ran out of time."""
        slots = asyncio.Semaphore(self.concurrency)
        timed_out: list[int] = []

        async def call(number: int, item: Scored) -> float | None:
            texts = (item.prompt, item.response)
            async with slots:
                deadline = asyncio.timeout(self.timeout_s)
                try:
                    async with deadline:
                        returned = await _call(function, texts)
                except Exception as error:  # the user's code: it may raise anything
                    if deadline.expired():
                        timed_out.append(number)
                        return None
                    raise RewardFailed(f"{_called(function, texts)} raised\n{own_traceback(error)}\n{REMEDY}") from None
            try:
                return None if returned is None else float(returned)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise RewardFailed(
                    f"{_called(function, texts)} must return a number, or None to abstain, got {returned!r:.100}; "
                    f"{REMEDY}"
                ) from None

        values = await asyncio.gather(*(call(number, item) for number, item in enumerate(items)))
        return values, timed_out


REMEDY = "Mend the function, and start the same command again"


def _called(function: Callable[..., object], texts: tuple[str, ...]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return f"{SETTING}: {name}({shown_texts(texts)})"


async def _call(function: Callable[..., object], texts: tuple[str, ...]) -> object:
    """Call a plain function in a thread, and an async one in this loop."""
    if inspect.iscoroutinefunction(function):
        with told_as_errors():
            return await function(*texts)
    loop = asyncio.get_running_loop()
    returned = loop.create_future()

    def settle(set_outcome: Callable[..., None], outcome: object) -> None:
        # A call that ran out of time is waited for no more, and its loop may be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if returned.done() else set_outcome(outcome))

    def run() -> None:
        try:
            with told_as_errors():
                outcome = function(*texts)
        except Exception as error:  # the user's code: it may raise anything
            settle(returned.set_exception, error)
        else:
            settle(returned.set_result, outcome)

    # Not of an executor, whose threads are waited for at the end of the process: a call may hang.
    threading.Thread(target=run, daemon=True, name="reward").start()
    return await returned
