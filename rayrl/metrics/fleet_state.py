"""State of a fleet (or of the oracle pool) as an operator sees it: `rayrl scale`, `rayrl status --live`."""

from typing import TypedDict


class FleetState(TypedDict):
    """What a fleet is seen to do."""

    name: str
    ready: int
    starting: int
    """Pending, starting, or silent."""
    draining: int
    calls: int
    """That replicas work on."""
    waiting: int
    """Calls that no replica has room for."""
    least: int
    most: int
    needs: str
    """What Ray sets aside for each replica."""
    failure: str | None
    """`Members.failure`."""
    has_given_up: bool
    """`Members.has_given_up`."""
