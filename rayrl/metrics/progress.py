"""Progress bars on a terminal or in a notebook. Elsewhere nothing is drawn: bars would leave empty lines in a log."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import get_console
from rich.progress import Progress

T = TypeVar("T")


def progress_bars() -> Progress:
    """Return bars that vanish when they are done; use it as a context manager."""
    console = get_console()
    is_visible = console.is_interactive or console.is_jupyter
    return Progress(transient=True, disable=not is_visible)


def track(items: Iterable[T], describe: str, *, total: int | None = None) -> Iterator[T]:
    """Yield the items, with a bar that follows them.

    Args:
        items: what to iterate over.
        describe: text beside the bar.
        total: number of items, for iterables without a length.
    """
    with progress_bars() as bars:
        yield from bars.track(items, total=total, description=describe)
