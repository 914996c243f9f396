"""A Python function as the expert: tests, simulations, and judges that are reached by code of one's own."""

import asyncio
import importlib
import inspect
import numbers
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayrl.config import ScriptedOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.judge import Rubric
from rayrl.oracles.limits import RateLimit
from rayrl.oracles.protocol import Verdict

_MAX_REASON = 300
"""Characters kept of an error's text."""


class ScriptedOracle:
    """Calls `function(prompt, response)`, plain or async, which returns a score or (score, rationale).

    Every call that returns counts as paid, whatever it returned; a None score abstains. A call that raises
    is refunded, so that a bug in the function does not eat the budget; one that runs out of time is not,
    since it may have paid somebody.
    """

    def __init__(self, config: ScriptedOracleConfig, rubric: Rubric) -> None:
        self._function = _load(config.function)
        self._rubric = rubric
        self._timeout_s = config.timeout_s
        self._requests = RateLimit(config.requests_per_minute)
        # Threads of its own: a function that hangs must not block the process's default executor.
        self._threads = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="oracle")
        self.name = f"scripted:{config.function}"

    def check(self) -> None:
        """Nothing left to check: the function was imported."""

    def estimate_usd(self, prompt: str, response: str) -> float:
        return 0.0

    async def judge(self, prompt: str, response: str) -> Verdict:
        await self._requests.acquire()
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                returned = await self._call(prompt, response)
        except Exception as error:  # the user's code: whatever it raises is a failed call
            if deadline.expired():
                return Verdict(score=None, rationale=f"no answer within {self._timeout_s:g} s")
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
            return Verdict(score=None, rationale=reason, billed=False)
        return self._verdict(returned)

    async def _call(self, prompt: str, response: str) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(prompt, response)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._function, prompt, response)

    def _verdict(self, returned: Any) -> Verdict:
        score: Any
        score, rationale = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
        if score is None:
            return Verdict(score=None, rationale=str(rationale) or "the function abstained")
        is_number = isinstance(score, numbers.Real) and not isinstance(score, bool)
        if not is_number or not self._rubric.accepts(float(score)):
            scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
            return Verdict(score=None, rationale=f"not a score from {scale}: {score!r}"[:_MAX_REASON])
        return Verdict(score=float(score), rationale=str(rationale))


def _load(path: str) -> Callable[[str, str], Any]:
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f'oracle.function must be "module:function", importable from {os.getcwd()}, got "{path}": {error}'
        ) from None
    function = vars(module).get(function_name)
    if not callable(function):
        raise ConfigError(f'oracle.function: module {module_name} has no function {function_name}, got "{path}"')
    return function
