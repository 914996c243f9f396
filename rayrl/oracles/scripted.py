"""Python functions as the oracle: tests, simulations, and judges that the user's own code reaches."""

import asyncio
import contextlib
import importlib
import inspect
import numbers
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rayrl.config import ScriptedOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.limits import RateLimit
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.oracles.user_modules import check_function, find_module, found_first, syntax_error
from rayrl.records import drawn_seed

_MAX_REASON = 300
"""Characters kept of an error's text."""
_MAX_SHOWN = 60
"""Characters shown of each text that a failed call was made with."""
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""Folder of rayrl itself."""


class ScriptedOracle:
    """Calls `function(prompt, response)`, plain or async, which returns a score or (score, rationale), and
    `compare_function(prompt, first, second)`, which returns "first", "second" or "tie", or that and a rationale.

    Every call that returns counts as paid, whatever it returned; None abstains. A function that raises is a failed
    judge: the call is refunded, the asking stops with the function's own traceback, and the question is asked again
    once it is mended. A call that runs out of time is not refunded, since the function may have paid for something.
    `flip_probability` turns so many of the comparisons around, and no score.
    Without a `compare_function` no two responses are compared: scoring both with `function` would be two calls under
    one reservation, and a budget must cover every call.
    """

    def __init__(self, config: ScriptedOracleConfig, rubric: Rubric) -> None:
        self._function = load_function(config.function, "oracle.function")
        compare = config.compare_function
        self._compare_function = None if compare is None else load_function(compare, "oracle.compare_function")
        self._rubric = rubric
        self._timeout_s = config.timeout_s
        self._requests = RateLimit(config.requests_per_minute)
        # Threads of its own: a function that hangs must not block the process's default executor.
        self._threads = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="oracle")
        self._flip_probability, self._flip_seed = config.flip_probability, config.flip_seed
        self.name = f"scripted:{config.function}"
        flips = f" flipped {config.flip_probability:g} by seed {config.flip_seed}" if config.flip_probability else ""
        self.comparer = f"scripted:{compare}{flips}"

    def check(self) -> None:
        """Do nothing: the functions were imported when this object was made."""

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        return None

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask(self._function, (prompt, response), self._read_score)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        if self._compare_function is None:
            return Verdict(score=None, rationale="oracle.compare_function is not set", billed=False)
        verdict = await self._ask(self._compare_function, (prompt, first, second), _read_preference)
        if verdict.score is None or not self._is_flipped(prompt, first, second):
            return verdict
        return replace(verdict, score=1 - verdict.score)

    def _is_flipped(self, prompt: str, first: str, second: str) -> bool:
        """Draw whether the comparison of these two responses is flipped, in whichever order they stand."""
        drawn = drawn_seed("flip", str(self._flip_seed), prompt, *sorted((first, second)))
        return drawn < self._flip_probability * 2**63

    async def _ask(
        self, function: Callable[..., object], texts: tuple[str, ...], read: Callable[[object], float]
    ) -> Verdict:
        await self._requests.acquire()
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                returned = await self._call(function, texts)
        except Exception as error:  # the user's code: whatever it raises is a failed call
            if deadline.expired():
                reason = f"no answer within {self._timeout_s:g} s (oracle.timeout_s)"
                return Verdict(score=None, rationale=reason, is_readable=False)
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
            name = getattr(function, "__qualname__", repr(function))
            failure = f"{name}({shown_texts(texts)}) raised\n{own_traceback(error)}\nMend the function"
            return Verdict(score=None, rationale=reason, billed=False, failure=failure)
        answer, rationale = _split(returned)
        if answer is None:
            return Verdict(score=None, rationale=rationale or "the function abstained")
        try:
            return Verdict(score=read(answer), rationale=rationale)
        except (ValueError, OverflowError) as error:
            return Verdict(score=None, rationale=str(error)[:_MAX_REASON])

    async def _call(self, function: Callable[..., object], texts: tuple[str, ...]) -> object:
        if inspect.iscoroutinefunction(function):
            with told_as_errors():
                return await function(*texts)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _run, function, texts)

    def _read_score(self, answer: object) -> float:
        # Real and not float, since the function may return a number of numpy's; True would be a number, too.
        if not isinstance(answer, bool) and isinstance(answer, numbers.Real):
            score = float(answer)
            if self._rubric.accepts(score):
                return score
        scale = f"{self._rubric.min_score} to {self._rubric.max_score}"
        raise ValueError(f"not a score from {scale}: {answer!r}")


def _run(function: Callable[..., object], texts: tuple[str, ...]) -> object:
    with told_as_errors():
        return function(*texts)


@contextlib.contextmanager
def told_as_errors() -> Generator[None]:
    """Turn what would end the process, or be lost on its way through a future, into an error like any other."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, StopIteration) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__) from None


def own_traceback(error: Exception) -> str:
    """Write an error's traceback without the lines of rayrl, of installed packages and of Python itself."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    lines = traceback.format_list(own or frames[-1:])
    return "".join(lines + traceback.format_exception_only(error)).rstrip()


def _is_library(filename: str) -> bool:
    folders = (_PACKAGE, *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")))
    return filename.startswith("<") or any(filename.startswith(folder + os.sep) for folder in folders)


def shown_texts(texts: tuple[str, ...]) -> str:
    """Write a call's arguments, each cut to its beginning."""
    return ", ".join(repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...") for text in texts)


def _split(returned: object) -> tuple[object, str]:
    """Split what a function returned into the answer and its rationale, "" where it gives none."""
    answer: object = returned
    rationale = ""
    if isinstance(returned, tuple):
        parts = cast(tuple[object, ...], returned)
        if len(parts) == 2:
            answer, rationale = parts[0], str(parts[1])
    return answer, rationale


def _read_preference(answer: object) -> float:
    for preference, share in PREFERENCE_SHARES.items():
        if isinstance(answer, str) and answer == preference:
            return share
    raise ValueError(f'not "first", "second" or "tie": {answer!r}')


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """Import the function that a setting names as "module:function", from the working directory if it is there.

    Raises:
        ConfigError: there is no such module or function, or its module cannot be imported.
    """
    check_function(path, setting)
    module_name, _, function_name = path.partition(":")
    found = find_module(module_name)
    try:
        # A console script has its own folder on the path, and not the working directory.
        with found_first(os.getcwd() if found is None else found.base):
            module = importlib.import_module(module_name)
    except SyntaxError as error:  # in a module that the user's imports
        raise ConfigError(f"{setting}: {syntax_error(error, Path(module_name))}; mend it") from None
    except Exception as error:  # the user's code: whatever it raises
        raise ConfigError(
            f'{setting} must be "module:function", importable from {os.getcwd()}, got "{path}", whose import raised\n'
            f"{own_traceback(error)}\nmend it"
        ) from None
    origin = getattr(module, "__file__", None)
    if found is not None and origin is not None and Path(origin).resolve() != found.file.resolve():
        raise ConfigError(
            f'{setting} must have a name of its own, got "{path}" in {found.file}: {origin} is loaded under that name '
            "already; rename yours"
        )
    function = vars(module).get(function_name)
    if not callable(function):
        raise ConfigError(f'{setting}: module {module_name} has no function {function_name}, got "{path}"')
    return function


def source_of(path: str, setting: str) -> str:
    """Read the text of the module that defines a setting's function; it stands for what the function does in keys.

    Raises:
        ConfigError: there is no such function, or it has no text.
    """
    module = getattr(load_function(path, setting), "__module__", None)
    try:
        return inspect.getsource(sys.modules[module or ""])
    except (KeyError, OSError, TypeError):
        raise ConfigError(
            f'{setting} must be written in Python, for its text tells its results from those of another, got "{path}", '
            f"which has none ({module or 'builtins'}); call it from a function of your own"
        ) from None
