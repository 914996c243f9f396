"""Progress bars, on a terminal or in a notebook; elsewhere they would leave nothing but empty lines in a log."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import get_console
from rich.progress import Progress

T = TypeVar("T")


def progress_bars() -> Progress:
    """Bars that vanish when they are done."""
    console = get_console()
    return Progress(transient=True, disable=not (console.is_interactive or console.is_jupyter))


def track(items: Iterable[T], describe: str, *, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that follows them; `total` says how many there are if they cannot."""
    with progress_bars() as bars:
        yield from bars.track(items, total=total, description=describe)
