"""Stop of a run by Ctrl-C, SIGTERM or `rayrl stop`: one set of signal handlers, in force from its start to its end.

The first signal stops the asking (`first`) and begins a countdown, at once and in a thread: the main thread may be
inside a library's code for a while. In the main thread it then raises `Stopped`, whose frames clean up. A process that
has not ended after `END_S` ends hard, and its guard (`rayrl.runs.guard`) ends what it leaves. Further signals change
nothing.

Ray sets a handler for SIGTERM when it is initialized, and one in C++ that prints a stack: `Stopping.install` is called
again after that. Ray Train would set one for SIGINT at every fit, which `rayrl.training.launch` keeps it from.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

END_S = 8.0
"""Longest time from a signal to the end of the process."""
STOP_REQUEST = signal.SIGUSR1
"""Signal that this process sends itself when an operator ends the run (`rayrl stop`)."""
STOPPED = 128 + signal.SIGINT
"""Exit code of a run that was stopped by Ctrl-C or `rayrl stop`."""
MESSAGE = "stopped; the same command continues the run"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, STOP_REQUEST)


class Stopped(KeyboardInterrupt):
    """The process was asked to end. No `except Exception` catches it."""


class Stopping:
    """Handlers of one process, and what has to be done first when a signal comes."""

    def __init__(self) -> None:
        self._first: list[Callable[[], object]] = []
        # Reentrant: a signal may come while the main thread holds it.
        self._begin_lock = threading.RLock()
        self._is_raised = False
        self._acting: threading.Thread | None = None
        self.exit_code: int | None = None
        """Once a signal has come, 128 and its number; that of Ctrl-C for an operator's request."""

    def install(self) -> None:
        """Set the handlers, again if others have taken their place; in the main thread, the only one that may."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    @contextmanager
    def first(self, action: Callable[[], object]) -> Generator[None]:
        """Call `action` at the first signal that comes within the context, before and beside everything else.

        The context does not end while an action is under way.
        """
        self._first.append(action)
        try:
            yield
        finally:
            self._first.remove(action)
            with self._begin_lock:
                acting = self._acting
            if acting is not None:
                acting.join(END_S)

    def stop(self, number: int) -> NoReturn:
        """Begin to end, if that has not begun, and raise `Stopped`."""
        self._is_raised = True
        self._begin(number)
        raise Stopped

    def follow(self, signals: int) -> None:
        """Begin to end when the number of a signal arrives in a pipe. Python writes it there as the signal comes."""
        while number := os.read(signals, 1):
            if number[0] in _SIGNALS:
                self._begin(number[0])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_raised:
            self.stop(number)

    def _begin(self, number: int) -> None:
        with self._begin_lock:
            if self.exit_code is not None:
                return
            self.exit_code = STOPPED if number == STOP_REQUEST else 128 + number
            # With the actions of now: the main thread may leave their contexts before the thread runs.
            acting = threading.Thread(target=_act, args=[list(self._first)], name="stop-first", daemon=True)
            acting.start()
            self._acting = acting
        countdown = threading.Timer(END_S, _end_hard, [self.exit_code])
        countdown.daemon = True
        countdown.start()


def _act(actions: list[Callable[[], object]]) -> None:
    for action in actions:
        try:
            action()
        except Exception as error:  # whatever it is, the process ends
            logger.warning("while the run was stopped: %s", error)


@contextmanager
def stoppable() -> Generator[Stopping]:
    """Let signals stop this process within the context, and give the handlers that were there back afterwards.

    In another thread than the main one, where no handler can be set, nothing stops it.
    """
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    follower = threading.Thread(target=stopping.follow, args=[reading], name="stop", daemon=True)
    follower.start()
    stopping.install()
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(writing)
        follower.join()
        os.close(reading)


def _end_hard(exit_code: int) -> None:
    """End the process whatever it is doing; the guard does the rest."""
    sys.stderr.write(f"{MESSAGE} (it did not end by itself within {END_S:.0f} s)\n")
    sys.stderr.flush()
    os._exit(exit_code)
